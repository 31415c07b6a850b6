"""The ledger's arithmetic: the reference is the definition, the extension has the same bits."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from hiedit import extension
from hiedit.ledger.accumulate import DTYPES, accumulate_, commit_, fma, materialize_

built = extension.load()
needs_cpp = pytest.mark.skipif(not built.available, reason=f"hiedit._C: {built.reason}")
backend = pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
orientation = pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])

# (O, I, r): below, at and above the panel of 16 and the tile of 6 rows, one wide, one tall.
SHAPES = [(1, 1, 1), (5, 3, 2), (6, 16, 1), (7, 17, 3), (13, 48, 33), (3, 501, 4), (601, 2, 5)]
SHAPES_IDS = ["x".join(map(str, shape)) for shape in SHAPES]
EDGES = [0.0, -0.0, 1.0, -1.0, 1 + 2**-23, 1 - 2**-24, 2.0**-149, -(2.0**-149), 2.0**-126,
         2.0**-75, 3.0e38, -3.0e38, 1e-20, 4097.0, 1 / 3]  # fmt: skip


def bits(t):
    """Equal bits, or both NaN: its payload is the one thing left open."""
    whole = {2: torch.int16, 4: torch.int32}[t.element_size()]
    return torch.where(t.isnan(), torch.zeros((), dtype=whole), t.view(whole)), t.isnan()


def assert_same_bits(one, other):
    assert one.dtype == other.dtype and one.shape == other.shape
    for x, y in zip(bits(one), bits(other), strict=True):
        assert torch.equal(x, y)


def factors(shape, seed=0, scale="mixed", spread=0.0):
    """A, B, scale and a stored weight's worth of accumulator; ``spread`` decades of magnitude."""
    O, I, r = shape  # noqa: E741
    g = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=g) * 10 ** (spread * torch.randn(size, generator=g))

    chosen = {
        "none": None,
        "ones": torch.ones(r),
        "mixed": torch.randint(0, 3, (r,), generator=g).float() * 0.7,
        "zeros": torch.zeros(r),
    }[scale]
    return draw(r, I), draw(O, r), chosen, draw(O * I)


def exact_fma(a: float, b: float, c: float) -> float:
    """Rational arithmetic, rounded once; independent of any floating-point addition."""
    x = Fraction(a) * Fraction(b) + Fraction(c)
    if x == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(x))) - 1, -126)
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    unit = Fraction(2) ** (exponent - 23)
    rounded = round(x / unit) * unit  # Python rounds halves to even
    return math.copysign(math.inf, x) if abs(rounded) >= 2**128 else float(rounded)


def test_fma_rounds_once():
    g = torch.Generator().manual_seed(1)
    grid = torch.cartesian_prod(*[torch.tensor(EDGES)] * 3)
    # Products that sit a hair beside a tie of the sum: fp64 would round them onto it.
    near = torch.stack([1 + torch.randint(1, 64, (500,), generator=g) * 2.0**-23,
                        1 + torch.randint(1, 64, (500,), generator=g) * 2.0**-23,
                        torch.randint(1, 9, (500,), generator=g) * 2.0**24], 1)  # fmt: skip
    tiny = torch.randn(500, 3, generator=g) * torch.tensor([1e-20, 1e-22, 1e-41])
    cases = torch.cat([grid, near, near * torch.tensor([1, 2.0**-31, 1]), tiny])
    found = fma(*cases.unbind(1)).tolist()
    for (a, b, c), value in zip(cases.tolist(), found, strict=True):
        assert value == exact_fma(a, b, c), (a, b, c)


def test_fma_differs_from_rounding_twice():
    """The correction is not idle: fp64 alone rounds onto a tie here, then to the wrong side."""
    a, b, c = (torch.tensor(x) for x in (2.0**-24 * (1 + 2.0**-15), 1 - 2.0**-15, 1 + 2.0**-23))
    twice = (a.double() * b.double() + c.double()).float()
    assert fma(a, b, c).item() == exact_fma(a.item(), b.item(), c.item()) == 1 + 2.0**-23
    assert twice.item() == 1 + 2.0**-22


@needs_cpp
@orientation
@pytest.mark.parametrize("scale", ["none", "mixed", "zeros"])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPES_IDS)
def test_extension_has_the_bits_of_the_reference(shape, scale, conv1d):
    A, B, s, acc = factors(shape, scale=scale)
    expected = accumulate_(acc.clone(), A, B, s, conv1d=conv1d, backend="reference")
    assert_same_bits(accumulate_(acc.clone(), A, B, s, conv1d=conv1d, backend="cpp"), expected)


@needs_cpp
@pytest.mark.parametrize("simd", ["best", "generic"])
@pytest.mark.parametrize("seed", range(4))
def test_extreme_magnitudes(seed, simd, monkeypatch):
    if simd == "generic":
        monkeypatch.setenv("HIEDIT_SIMD", "generic")
        assert extension.instruction_set() == "generic"
    A, B, s, acc = factors((37, 43, 9), seed, spread=12.0)
    edges = torch.tensor([*EDGES, math.inf, -math.inf, math.nan])
    for t in (A, B, acc):
        flat = t.view(-1)
        at = torch.randperm(len(flat))[: len(flat) // 4]
        flat[at] = edges[torch.randint(0, len(edges), (len(at),))]
    expected = accumulate_(acc.clone(), A, B, s, backend="reference")
    assert not expected.isfinite().all() and expected.isfinite().any()
    assert_same_bits(accumulate_(acc.clone(), A, B, s, backend="cpp"), expected)


@needs_cpp
@orientation
def test_threads_do_not_matter(conv1d, threads):
    A, B, s, acc = factors((301, 523, 6))  # several grains of elements
    expected = accumulate_(acc.clone(), A, B, s, conv1d=conv1d, threads=1, backend="cpp")
    for pool, limit in [(4, 0), (4, 3), (4, 2), (1, 8)]:
        threads(pool)
        found = accumulate_(acc.clone(), A, B, s, conv1d=conv1d, threads=limit, backend="cpp")
        assert_same_bits(found, expected)


@needs_cpp
def test_flushing_subnormals_does_not_matter():
    A, B, s, acc = factors((40, 40, 3), scale="mixed")
    A, B, acc = A * 1e-22, B * 1e-19, acc * 1e-40
    expected = accumulate_(acc.clone(), A, B, s, backend="reference")
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this CPU cannot flush subnormal numbers")
        found = accumulate_(acc.clone(), A, B, s, backend="cpp")
    finally:
        torch.set_flush_denormal(False)
    assert (expected != 0).any()
    assert_same_bits(found, expected)


@backend
@orientation
def test_ranges_compose_to_the_whole(backend, conv1d):
    shape = O, I, r = 11, 29, 4  # noqa: E741
    A, B, s, acc = factors(shape)
    expected = accumulate_(acc.clone(), A, B, s, conv1d=conv1d, backend="reference")
    cuts = [0, 0, 1, 5, 29, 30, 58, 100, 187, O * I - 1, O * I]
    whole, shards = acc.clone(), []
    for start, end in zip(cuts, cuts[1:], strict=False):
        accumulate_(whole, A, B, s, start=start, end=end, conv1d=conv1d, backend=backend)
        shard = acc[start:end].clone()
        shards.append(
            accumulate_(shard, A, B, s, start=start, end=end, conv1d=conv1d, backend=backend)
        )
    assert_same_bits(whole, expected)
    assert_same_bits(torch.cat(shards), expected)


@backend
def test_nothing_outside_the_range_is_touched(backend):
    A, B, s, _ = factors((9, 21, 3))
    for start, end in [(0, 5), (3, 150), (22, 23), (21, 63), (40, 40)]:
        acc = torch.full((9 * 21,), math.nan)
        acc[start:end] = 0
        accumulate_(acc, A, B, s, start=start, end=end, backend=backend)
        assert acc[start:end].isfinite().all()
        assert acc[:start].isnan().all() and acc[end:].isnan().all()


@backend
def test_batches_equal_one_by_one(backend):
    """Concatenated rank rows of several edits are those edits in order."""
    edits = [factors((19, 23, r), seed=r) for r in (1, 4, 2, 7)]
    one_by_one = torch.zeros(19 * 23)
    for A, B, s, _ in edits:
        accumulate_(one_by_one, A, B, s, backend=backend)
    A, B, s = (torch.cat([e[i] for e in edits], dim=d) for i, d in ((0, 0), (1, 1), (2, 0)))
    assert_same_bits(accumulate_(torch.zeros(19 * 23), A, B, s, backend=backend), one_by_one)


@backend
def test_rows_with_zero_scale_take_no_part(backend):
    A, B, _, acc = factors((8, 8, 4))
    A[1], B[:, 3] = math.nan, math.inf
    scale = torch.tensor([0.5, 0.0, 1.0, -0.0])
    kept = torch.tensor([0, 2])
    expected = accumulate_(acc.clone(), A[kept], B[:, kept], scale[kept], backend=backend)
    found = accumulate_(acc.clone(), A, B, scale, backend=backend)
    assert found.isfinite().all()
    assert_same_bits(found, expected)


@backend
@orientation
def test_it_is_the_product(backend, conv1d):
    A, B, s, _ = factors((31, 45, 6))
    expected = (B.double() * s) @ A.double()
    acc = torch.zeros((45, 31) if conv1d else (31, 45))
    accumulate_(acc, A.half().float(), B, s, conv1d=conv1d, backend=backend)
    close = accumulate_(torch.zeros_like(acc), A.half(), B, s, conv1d=conv1d, backend=backend)
    assert_same_bits(close, acc)  # half-precision factors are widened exactly
    torch.testing.assert_close((acc.T if conv1d else acc).double(), expected, rtol=1e-2, atol=1e-2)


@backend
def test_views_and_strides_of_factors(backend):
    A, B, s, acc = factors((12, 10, 6))
    expected = accumulate_(acc.clone(), A[::2].clone(), B[:, ::2].clone(), s[::2].clone(),
                           backend=backend)  # fmt: skip
    found = accumulate_(acc.clone(), A[::2], B[:, ::2], s[::2], backend=backend)
    assert_same_bits(found, expected)


def every_bit_pattern(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_zero_accumulator_gives_back_every_bit_of_the_base(backend, dtype):
    base = every_bit_pattern(dtype)
    for zero in (0.0, -0.0):
        acc = torch.full(base.shape, zero)
        found = materialize_(torch.ones_like(base), base, acc, backend=backend)
        assert torch.equal(found.view(torch.int16), base.view(torch.int16))


@backend
def test_a_zero_accumulator_keeps_negative_zero_in_fp32(backend):
    base = torch.tensor([-0.0, 0.0, 1.5, 2.0**-149] * 5)
    found = materialize_(torch.empty_like(base), base, torch.zeros(20), backend=backend)
    assert torch.equal(found.view(torch.int32), base.view(torch.int32))


@needs_cpp
@pytest.mark.parametrize("simd", ["best", "generic"])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)
def test_rounding_has_the_bits_of_the_reference(dtype, simd, monkeypatch):
    if simd == "generic":
        monkeypatch.setenv("HIEDIT_SIMD", "generic")
    g = torch.Generator().manual_seed(2)
    base = every_bit_pattern(torch.bfloat16 if dtype == torch.float32 else dtype).to(dtype)
    base = base.repeat(4)
    unit = (base.float().abs() * 2.0 ** (-8 if dtype == torch.bfloat16 else -11)).nan_to_num(1, 1)
    ties = unit * torch.randint(-4, 5, base.shape, generator=g) / 2
    noise = torch.randn(base.shape, generator=g) * unit
    for acc in (ties, noise, noise * 1e4, torch.full(base.shape, math.inf), ties * math.nan):
        expected = materialize_(torch.empty_like(base), base, acc, backend="reference")
        found = materialize_(torch.empty_like(base), base, acc, backend="cpp")
        assert_same_bits(found, expected)


@backend
def test_materialize_in_ranges_shards_and_in_place(backend):
    g = torch.Generator().manual_seed(3)
    base, acc = torch.randn(7, 9, generator=g).bfloat16(), torch.randn(7, 9, generator=g)
    expected = (base.float() + acc).bfloat16().view(-1)
    out = torch.full((7, 9), math.nan, dtype=torch.bfloat16)
    materialize_(out, base, acc, start=5, end=40, backend=backend)
    assert torch.equal(out.view(-1)[5:40], expected[5:40])
    assert out.view(-1)[:5].isnan().all() and out.view(-1)[40:].isnan().all()
    shard = base.view(-1)[5:40].clone()  # base given as the shard, accumulator as the whole
    materialize_(shard, shard, acc, start=5, end=40, backend=backend)
    assert torch.equal(shard, expected[5:40])
    materialize_(base, base, acc, backend=backend)
    assert torch.equal(base.view(-1), expected)


@backend
@orientation
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPES_IDS)
def test_a_commit_is_both_in_one_pass(shape, dtype, conv1d, backend):
    """Of a whole weight, and of shards and ranges that cut through rows, at any thread count."""
    for scale in ("none", "mixed", "zeros"):
        A, B, s, acc = factors(shape, scale=scale)
        base = torch.randn(len(acc), generator=torch.Generator().manual_seed(9)).to(dtype)
        base[0], acc[0] = -0.0, 0.0
        summed = accumulate_(acc.clone(), A, B, s, conv1d=conv1d, backend="reference")
        expected = materialize_(base.clone(), base, summed, backend="reference")
        cuts = sorted({0, len(acc) // 3, len(acc) * 5 // 7, len(acc)})
        for ends in [(0, len(acc)), cuts]:
            weight, whole, shards = base * math.nan, acc.clone(), []
            for start, end in zip(ends, ends[1:], strict=False):
                at = {"start": start, "end": end, "conv1d": conv1d, "backend": backend}
                commit_(weight, base, whole, A, B, s, threads=start % 3, **at)
                shard = base[start:end].clone()  # in place, W_0 given as a whole
                shards.append(commit_(shard, base, acc[start:end].clone(), A, B, s, **at))
            assert_same_bits(whole, summed)
            assert_same_bits(weight, expected)
            assert_same_bits(torch.cat(shards), expected)


@backend
def test_small_shifts_are_not_lost(backend, capsys):
    """400 shifts of relative size 5e-5 on a bf16 weight: where `W += shift` loses nearly all."""
    n = 1024 if backend == "cpp" else 96  # the reference is slow
    g = torch.Generator().manual_seed(4)
    W0 = torch.randn(n, n, generator=g).bfloat16()
    acc, naive = torch.zeros(n, n), W0.clone()
    A, B = torch.randn(400, n, generator=g), torch.randn(n, 400, generator=g) * 5e-5
    for k in range(400):
        a, b = A[k : k + 1], B[:, k : k + 1]
        accumulate_(acc, a, b, backend=backend)
        naive += (b @ a).bfloat16()
    exact = B.double() @ A.double()
    error = ((acc - exact).norm() / exact.norm()).item()
    lost = ((naive.double() - W0.double() - exact).norm() / exact.norm()).item()
    with capsys.disabled():
        print(f"[{backend}: accumulator {error:.1e}, in bf16 {lost:.2f} lost]", end=" ")
    assert error <= 1e-6 < 0.5 < lost


def test_autograd_notices_the_change():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    loss = (weight * weight).sum()
    materialize_(weight, weight.detach().clone(), torch.ones(2, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


A, B, ACC = torch.ones(2, 3), torch.ones(4, 2), torch.zeros(4, 3)


@backend
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((ACC, A, torch.ones(4, 5)), {}, r"A \(2, 3\) and B \(4, 5\)"),
        ((ACC, A, B, torch.ones(3)), {}, r"scale must be \[r\] = \[2\], got \(3,\)"),
        ((ACC, A, B), {"start": 3, "end": 13}, r"range \[3, 13\)"),
        ((ACC, A, B), {"start": 5, "end": 4}, r"range \[5, 4\)"),
        ((torch.zeros(5), A, B), {}, "acc has 5 elements"),
        ((ACC.double(), A, B), {}, "acc must be contiguous float32"),
        ((torch.zeros(3, 4).T, A, B), {}, "acc must be contiguous float32"),
        ((ACC, A.double(), B), {}, "A is torch.float64"),
    ],
)
def test_wrong_arguments(backend, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        accumulate_(*arguments, **options, backend=backend)


@backend
def test_wrong_weights(backend):
    w = torch.zeros(4, 3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="share one of"):
        materialize_(w, w.float(), ACC, backend=backend)
    with pytest.raises(ValueError, match="acc has 5 elements"):
        materialize_(w, w, torch.zeros(5), backend=backend)
    with pytest.raises(ValueError, match="weight must be contiguous"):
        materialize_(w.T, w.T, ACC, backend=backend)
    acc = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="share one of"):
        commit_(w, w.float(), acc, A, B, backend=backend)
    with pytest.raises(ValueError, match="scale must be"):
        commit_(w, w.clone(), acc, A, B, torch.ones(3), backend=backend)
    assert not acc.any() and not w.any()


@needs_cpp
def test_the_operators_check_too():
    """Whoever calls torch.ops.hiedit directly gets shapes, not a crash."""
    ops = torch.ops.hiedit
    for call, message in [
        (lambda: ops.accumulate_(ACC, A, torch.ones(4, 5), None, 0, 12, False, 0), r"\[4, 5\]"),
        (lambda: ops.accumulate_(ACC, A, B, torch.ones(3), 0, 12, False, 0), r"got \[3\]"),
        (lambda: ops.accumulate_(ACC, A, B, None, 0, 13, False, 0), r"\[0, 13\)"),
        (lambda: ops.accumulate_(torch.zeros(9), A, B, None, 2, 8, False, 0), "whole weight"),
        (lambda: ops.accumulate_(ACC.half(), A, B, None, 0, 12, False, 0), "float32"),
        (lambda: ops.accumulate_(ACC, A, B, None, 0, 12, False, -1), "threads"),
        (lambda: ops.materialize_(ACC, ACC, torch.zeros(5), 0, 12), r"\[5\]"),
        (lambda: ops.materialize_(ACC.double(), ACC, ACC, 0, 12), "W must be"),
        (lambda: ops.commit_(ACC, ACC.half(), ACC, A, B, None, 0, 12, False, 0), "W0 must have"),
        (lambda: ops.commit_(ACC, ACC, ACC, A, B, None, 0, 13, False, 0), r"\[0, 13\)"),
        (lambda: ops.commit_(ACC, torch.zeros(5), ACC, A, B, None, 0, 12, False, 0), r"\[5\]"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_choice_of_backend(monkeypatch):
    monkeypatch.setattr(extension, "load", lambda: extension.Extension(None, "it was not built"))
    with pytest.raises(RuntimeError, match="was not built; install a C.. compiler"):
        accumulate_(ACC.clone(), A, B, backend="cpp")
    expected = torch.full((4, 3), 2.0)
    assert torch.equal(accumulate_(ACC.clone(), A, B), expected)  # auto falls back
    monkeypatch.setenv("HIEDIT_BACKEND", "cpp")
    with pytest.raises(RuntimeError, match="was not built"):
        accumulate_(ACC.clone(), A, B)
    assert torch.equal(accumulate_(ACC.clone(), A, B, backend="reference"), expected)
    monkeypatch.setenv("HIEDIT_BACKEND", "fortran")
    with pytest.raises(ValueError, match="HIEDIT_BACKEND.*'fortran'.*reference"):
        accumulate_(ACC.clone(), A, B)
