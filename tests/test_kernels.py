"""The commit's GPU kernels against the definition in accumulate.py, bit for bit.

``triton`` runs on the GPU, or without one in an interpreter. ``cuda`` needs a GPU; ``host`` is
the same ``csrc/commit.cu``, compiled for the CPU and run thread by thread.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_accumulate import EDGES, SHAPES, SHAPES_IDS, assert_same_bits, every_bit_pattern, factors
from test_state import layers, same, shift, weights
from triton_here import DEVICE, needs_gpu, triton_environment  # noqa: F401

import hiedit.ledger.accumulate
from hiedit import extension
from hiedit.ledger import dispatch
from hiedit.ledger.accumulate import DTYPES, Update, commit_, commit_group_, materialize_
from hiedit.ledger.state import DeltaState
from hiedit.types import Shift

if not dispatch._kernels()[0].rounds_once():
    reason = "this Triton's interpreter rounds an fma twice: pip install 'triton>=3.9'"
    pytest.skip(reason, allow_module_level=True)

CSRC = Path(__file__).resolve().parents[1] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
# Of NumPy, in the interpreter, where a test is about overflow or NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16", "fp32"])
orientation = pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])


@pytest.fixture(scope="session")
def host_library(tmp_path_factory):
    """``csrc/commit.cu`` for the CPU."""
    if COMPILER is None:
        pytest.skip("no C++ compiler (set CXX)")
    path = tmp_path_factory.mktemp("host") / "commit_host.so"
    command = [COMPILER, "-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing",
               "-Wno-unknown-pragmas", "-shared", "-fPIC", CSRC / "tests" / "commit_host.cpp",
               "-o", path]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(path))


def on_host(library):
    """``dispatch.launch`` on the CPU, with the arguments that the CUDA operator gets."""
    from hiedit_kernels.table import Table

    def launch(_, updates, mask=None, *, start, end, conv1d=False):
        first = updates[0]
        columns = 4096 if first.A is None else (first.B.shape[0] if conv1d else first.A.shape[1])
        table = Table.of(updates, start, end, conv1d)
        kept = None if mask is None else mask.bool()
        types = dispatch._DTYPES[table.weight], dispatch._DTYPES[table.factor]
        library.commit_on_host(
            ctypes.c_void_p(table.entries.data_ptr()),
            None if kept is None else ctypes.c_void_p(kept.data_ptr()),
            *map(ctypes.c_int64, (len(updates), columns, start, end)), int(not conv1d), *types,
        )  # fmt: skip

    return launch


@pytest.fixture(params=["triton", pytest.param("cuda", marks=needs_gpu), "host"])
def backend(request, monkeypatch):
    """A backend's name; for ``host`` everything but the launch is the dispatch's own code."""
    if request.param != "host":
        return request.param
    if DEVICE != "cpu":
        pytest.skip("the kernel itself runs on this GPU")
    launch = on_host(request.getfixturevalue("host_library"))
    monkeypatch.setattr(hiedit.ledger.accumulate, "launch", launch)
    monkeypatch.setattr(dispatch, "_cuda_problem", lambda target: None)
    return "cuda"


def module(shape, dtype, seed, rank, scale="none", factor=torch.float32, conv1d=False):
    """An Update whose weight is poisoned, and the shift's A, B and scale."""
    A, B, s, acc = factors((*shape[:2], rank), seed, scale)
    base = torch.randn(len(acc), generator=torch.Generator().manual_seed(seed)).to(dtype)
    base[0], acc[0] = -0.0, 0.0
    layout = shape[::-1] if conv1d else shape
    update = Update(acc.view(layout), A.to(factor), B.to(factor), s, base.view(layout) * math.nan,
                    base.view(layout))  # fmt: skip
    return moved(update)


def moved(update, device=DEVICE):
    parts = (update.acc, update.A, update.B, update.scale, update.weight, update.base)
    return Update(*(None if t is None else t.clone().to(device) for t in parts))


def expected(update, **options):
    """The same after the reference, on the CPU."""
    u = moved(update, "cpu")
    commit_(u.weight, u.base, u.acc, u.A, u.B, u.scale, **options, backend="reference")
    return u


def assert_same(found, wanted):
    assert_same_bits(found.acc.cpu(), wanted.acc)
    assert_same_bits(found.weight.cpu(), wanted.weight)


@dtypes
@orientation
def test_a_group_is_its_modules_one_by_one(backend, dtype, conv1d):
    """Ragged ranks (0 too), scales, dtypes of factors, a masked module; whole and cut ranges."""
    shape = (37, 203)
    group = [
        module(shape, dtype, 1, 5, "mixed", torch.bfloat16, conv1d),
        module(shape, dtype, 2, 0, "none", torch.float32, conv1d),
        module(shape, dtype, 3, 3, "none", torch.float16, conv1d),
        module(shape, dtype, 4, 9, "mixed", torch.float32, conv1d),
        module(shape, dtype, 5, 4, "zeros", torch.float32, conv1d),
    ]
    mask = torch.tensor([1, 1, 1, 0, 1], device=DEVICE)
    for start, end in [(0, 37 * 203), (411, 5002)]:
        options = {"start": start, "end": end, "conv1d": conv1d}
        wanted = [expected(u, **options) for u in group]
        found = [moved(u) for u in group]
        commit_group_(found, mask, **options, backend=backend)
        for u, w, before, keep in zip(found, wanted, group, mask.tolist(), strict=True):
            assert_same(u, w if keep else moved(before, "cpu"))
        assert found[3].weight.isnan().all()


@orientation
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPES_IDS)
def test_odd_shapes(backend, shape, conv1d):
    for dtype, scale in ((torch.bfloat16, "mixed"), (torch.float32, "none")):
        u = module(shape[:2], dtype, 1, shape[2], scale, conv1d=conv1d)
        wanted = expected(u, conv1d=conv1d)
        commit_group_([u], conv1d=conv1d, backend=backend)
        assert_same(u, wanted)


def test_all_rows_of_many_tiles(backend, monkeypatch):
    """More tiles than one both ways, a rank that the unrolling does not divide, aligned memory."""
    kernels = dispatch._kernels()[0]
    if kernels.INTERPRETED:
        tiles = {"BR": 16, "BC": 32, "UNROLL": 4}
        monkeypatch.setattr(kernels, "_tiles", lambda *_: tiles)
    u = module((40, 80), torch.bfloat16, 1, 7, "mixed")
    wanted = expected(u)
    commit_group_([u], backend=backend)
    assert_same(u, wanted)


def test_extreme_magnitudes(backend):
    u = module((37, 43), torch.float16, 3, 9, "mixed")
    g = torch.Generator().manual_seed(0)
    edges = torch.tensor([*EDGES, math.inf, -math.inf, math.nan], device=DEVICE)
    for t in (u.A, u.B, u.acc):
        at = torch.randperm(t.numel(), generator=g)[: t.numel() // 4]
        t.view(-1)[at] = edges[torch.randint(0, len(edges), (len(at),), generator=g)]
    wanted = expected(u)
    assert not wanted.acc.isfinite().all() and wanted.acc.isfinite().any()
    commit_group_([u], backend=backend)
    assert_same(u, wanted)


def test_subnormal_sums_are_kept(backend):
    u = module((40, 40), torch.float32, 1, 3)
    u.A.mul_(1e-22), u.B.mul_(1e-19), u.acc.mul_(1e-40), u.base.mul_(1e-40)
    wanted = expected(u)
    assert (wanted.acc != 0).any() and (wanted.acc.abs() < 2.0**-126).all()
    commit_group_([u], backend=backend)
    assert_same(u, wanted)


def test_rank_rows_that_do_not_count_leave_negative_zeros(backend):
    """Neither those of scale 0 nor those that fill a group of the unrolling add +0.0."""
    zeros = torch.full((4, 6), -0.0, device=DEVICE)
    A, B = torch.ones(3, 6, device=DEVICE), torch.full((4, 3), -0.0, device=DEVICE)
    for scale in (None, torch.tensor([1.0, 0.0, 1.0], device=DEVICE)):
        u = Update(zeros.clone(), A, B, scale, torch.empty_like(zeros), zeros + 1)
        wanted = expected(u)
        assert wanted.acc.signbit().all()
        commit_group_([u], backend=backend)
        assert_same(u, wanted)


@dtypes
def test_rounding(backend, dtype):
    """Of every 16-bit pattern, at and beside the ties."""
    g = torch.Generator().manual_seed(2)
    base = every_bit_pattern(torch.bfloat16 if dtype == torch.float32 else dtype).to(dtype)
    unit = (base.float().abs() * 2.0 ** (-8 if dtype == torch.bfloat16 else -11)).nan_to_num(1, 1)
    ties = unit * torch.randint(-4, 5, base.shape, generator=g) / 2
    for acc in (ties, torch.randn(base.shape, generator=g) * unit * 1e3, ties * 0):
        wanted = materialize_(torch.empty_like(base), base, acc, backend="reference")
        here = base.to(DEVICE)
        found = materialize_(torch.empty_like(here), here, acc.to(DEVICE), backend=backend)
        assert_same_bits(found.cpu(), wanted)


@orientation
def test_shards_compose_and_nothing_else_is_touched(backend, conv1d):
    u = module((11, 29), torch.bfloat16, 1, 4, "mixed", conv1d=conv1d)
    wanted = expected(u, conv1d=conv1d)
    cuts = [0, 1, 5, 30, 187, 318, 319]
    for start, end in zip(cuts, cuts[1:], strict=False):
        # Each shard in the middle of poison: its neighbours in memory belong to someone else.
        pad = [torch.full((end - start + 32,), math.nan, dtype=t.dtype, device=DEVICE)
               for t in (u.acc, u.weight)]  # fmt: skip
        acc, weight = (t[16:-16] for t in pad)
        acc.copy_(u.acc.view(-1)[start:end])
        commit_(weight, u.base, acc, u.A, u.B, u.scale, start=start, end=end, conv1d=conv1d,
                backend=backend)  # fmt: skip
        assert_same_bits(acc.cpu(), wanted.acc.view(-1)[start:end])
        assert_same_bits(weight.cpu(), wanted.weight.view(-1)[start:end])
        for t in pad:
            assert t[:16].isnan().all() and t[-16:].isnan().all()


@orientation
def test_positions_beyond_32_bits(backend, conv1d):
    """A shard from the end of a weight of 4.9e9 elements."""
    rows, columns, size = 1_200_007, 4_099, 4_200
    O, I = (columns, rows) if conv1d else (rows, columns)  # noqa: E741
    start = rows * columns - size
    assert start > 2**32
    g = torch.Generator().manual_seed(1)
    A, B, acc = (torch.randn(*n, generator=g) for n in ((2, I), (O, 2), (size,)))
    base = torch.randn(size, generator=g).bfloat16()
    u = moved(Update(acc, A, B, None, base * math.nan, base))
    wanted = expected(u, start=start, conv1d=conv1d)
    commit_group_([u], start=start, conv1d=conv1d, backend=backend)
    assert_same(u, wanted)


def test_strided_factors_and_refused_weights(backend):
    u = module((12, 20), torch.float32, 1, 6, "mixed")
    wide = Update(u.acc, u.A[::2], u.B[:, ::2], u.scale[::2], u.weight, u.base)
    transposed = Update(u.acc, u.A.T.contiguous().T, u.B.T.contiguous().T, u.scale, u.weight,
                        u.base)  # fmt: skip
    for given in (wide, transposed):
        copies = moved(u)
        found = Update(copies.acc, given.A, given.B, given.scale, copies.weight, copies.base)
        wanted = expected(found)
        commit_group_([found], backend=backend)
        assert_same(found, wanted)
    before = moved(u)
    for bad in ({"weight": u.weight.T.contiguous().T}, {"acc": u.acc.T.contiguous().T}):
        found = Update(**{**vars(before), **bad})
        with pytest.raises(ValueError, match="must be contiguous"):
            commit_group_([u, found], backend=backend)
    assert_same(u, moved(before, "cpu"))


def test_groups_that_do_not_fit(backend):
    u, v = (module((6, 8), torch.float32, seed, 2) for seed in (1, 2))
    other = module((8, 6), torch.float32, 3, 2)
    half = module((6, 8), torch.float16, 3, 2)
    bare = Update(u.acc, u.A, u.B)
    for group, mask, message in [
        ([u, other], None, r"must share \(O, I\) and dtype"),
        ([u, half], None, r"must share \(O, I\) and dtype"),
        ([u, bare], None, "needs weight, base"),
        ([u, v], torch.ones(3, device=DEVICE), r"mask must be \[2\].*got \(3,\)"),
    ]:
        before = [moved(x) for x in group if x.weight is not None]
        with pytest.raises(ValueError, match=message):
            commit_group_(group, mask, backend=backend)
        for x, y in zip([x for x in group if x.weight is not None], before, strict=True):
            assert_same(x, moved(y, "cpu"))
    commit_group_([], backend=backend)
    empty = moved(u)
    commit_group_([u], torch.zeros(1, device=DEVICE), backend=backend)
    commit_group_([u], start=7, end=7, backend=backend)
    assert_same(u, moved(empty, "cpu"))


@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_the_cpu_backends_take_groups_and_masks(name):
    if name == "cpp" and not extension.load().available:
        pytest.skip(f"hiedit._C: {extension.load().reason}")
    group = [moved(module((9, 14), torch.bfloat16, seed, seed, "mixed"), "cpu") for seed in (1, 2)]
    before, wanted = moved(group[0], "cpu"), expected(group[1])
    commit_group_(group, torch.tensor([False, True]), backend=name)
    assert_same(group[0], before)
    assert_same(group[1], wanted)


def here(one):
    return Shift(*(None if t is None else t.to(DEVICE) for t in (one.A, one.B, one.scale)))


def test_a_commit_of_the_ledger_is_one_launch_per_shape(backend, monkeypatch):
    """Of DeltaState: same bits as the reference, masked modules not launched at all."""
    edits = [{"a": shift(1), "b": shift(2, 5), "c": shift(3)},
             {"a": shift(4, 2), "b": shift(5, 3, torch.zeros(3))}]  # fmt: skip
    launches = []
    inner = hiedit.ledger.accumulate.launch
    monkeypatch.setattr(
        hiedit.ledger.accumulate,
        "launch",
        lambda name, updates, *rest, **named: (
            launches.append(len(updates)),
            inner(name, updates, *rest, **named),
        ),
    )
    found = {}
    for chosen in (backend, "reference"):
        monkeypatch.setenv("HIEDIT_BACKEND", chosen)
        modules = layers()
        for m in modules.values():
            m.module.to(DEVICE)
        state = DeltaState(modules)
        for edit in edits:
            state.commit({name: here(one) for name, one in edit.items()})
        found[chosen] = {name: t.cpu() for name, t in weights(modules).items()}
    assert same(found[backend], found["reference"])
    assert launches == [2, 1, 1]  # a and b, the Conv1D c; then a alone


@needs_gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@dtypes
def test_real_sizes_on_a_gpu(backend, dtype):
    """Half of 4 modules masked, against the C++ core where it is there."""
    if dispatch.problem(backend, torch.zeros(1, device="cuda")):
        pytest.skip(dispatch.problem(backend, torch.zeros(1, device="cuda")))
    group = [module((1024, 1536), dtype, seed, 33, "mixed") for seed in range(4)]
    wanted = [moved(u, "cpu") for u in group]
    for u in wanted[:2]:
        commit_(u.weight, u.base, u.acc, u.A, u.B, u.scale)
    commit_group_(group, torch.tensor([1, 1, 0, 0], device="cuda"), backend=backend)
    for u, w in zip(group, wanted, strict=True):
        assert_same(u, w)


@needs_gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_weight_of_more_than_2_31_bytes_on_a_gpu(backend):
    if dispatch.problem(backend, torch.zeros(1, device="cuda")):
        pytest.skip(dispatch.problem(backend, torch.zeros(1, device="cuda")))
    rows, columns = 36_000, 32_768
    if torch.cuda.mem_get_info()[0] < 14 * rows * columns:
        pytest.skip("needs 16 GB of free GPU memory")
    assert rows * columns * 2 > 2**31
    A, B = torch.randn(3, columns, device="cuda"), torch.randn(rows, 3, device="cuda")
    base = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    u = Update(torch.zeros(rows, columns, device="cuda"), A, B, None, torch.empty_like(base), base)
    commit_group_([u], backend=backend)
    for first in (0, rows // 2, rows - 8):
        part = slice(first, first + 8)
        few = Update(torch.zeros(8, columns), A.cpu(), B[part].cpu(), None,
                     torch.empty(8, columns, dtype=base.dtype), base[part].cpu())  # fmt: skip
        wanted = expected(few)
        assert_same_bits(u.acc[part].cpu(), wanted.acc)
        assert_same_bits(u.weight[part].cpu(), wanted.weight)
