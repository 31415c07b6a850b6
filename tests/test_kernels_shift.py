"""The functional shift in Triton against its PyTorch reference, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from triton_here import DEVICE, needs_gpu, reference, shift, triton_environment  # noqa: F401

modes = pytest.mark.parametrize("mode", ["none", "per-rank", "per-sequence", "per-token"])
EXACT = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def arguments(mode, sizes=(3, 7, 37, 21, 19), dtype=torch.float32, by_scale=True):
    """out, x, A, B, scale, all wanting gradients, and rows; some scales 0, some not 1."""
    N, S, I, O, r = sizes  # noqa: E741
    g = torch.Generator().manual_seed(0)

    def draw(*size):
        t = torch.randn(size, generator=g, dtype=torch.float64)
        return t.to(DEVICE, dtype).requires_grad_()

    out, x, A, B = draw(N, S, O), draw(N, S, I), draw(r, I), draw(O, r)
    if mode == "none":
        return out, x, A, B, None, None
    size = (r,) if mode == "per-rank" else (N, r)
    scale = torch.randint(0, 3, size, generator=g).to(DEVICE, dtype) / 2
    rows = torch.arange(N, device=DEVICE).repeat_interleave(S) if len(size) == 2 else None
    if mode == "per-token":  # packed: sequences of different lengths, in one row of tokens
        out, x = (t.detach().view(1, N * S, -1).requires_grad_() for t in (out, x))
        rows = (torch.arange(N * S, device=DEVICE) // 5).clamp(max=N - 1)
    return out, x, A, B, scale.requires_grad_(by_scale), rows


def assert_agree(found, wanted, dtype):
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error <= EXACT[dtype], error


def both(mode, dtype=torch.float32, by_scale=True, sizes=(3, 7, 37, 21, 19)):
    """Asserts that values and gradients agree with the reference."""
    given = arguments(mode, sizes, dtype, by_scale)
    wanting = [t for t in given[:5] if t is not None and t.requires_grad]
    passed = given if mode == "per-token" else (*given[:5], None)
    values, gradients = [], []
    for function, inputs in ((shift.shifted, passed), (reference.shifted, given)):
        y = function(*inputs)
        weight = torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y).to(dtype)
        values.append(y)
        gradients.append(torch.autograd.grad((y * weight).sum(), wanting))
    assert_agree((values[0], *gradients[0]), (values[1], *gradients[1]), dtype)


@modes
@pytest.mark.parametrize("by_scale", [True, False], ids=["grad-of-scale", "scale-fixed"])
def test_values_and_gradients(mode, by_scale):
    both(mode, by_scale=by_scale)


@pytest.mark.parametrize("dtype", EXACT, ids=["fp64", "fp32", "fp16", "bf16"])
def test_dtypes(dtype):
    if shift.INTERPRETED and dtype == torch.bfloat16:
        with pytest.raises(RuntimeError, match="multiplies the bits of bf16"):
            both("per-sequence", dtype)
    else:
        both("per-sequence", dtype)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1, 1), (1, 16, 32, 32, 16), (2, 17, 33, 65, 33), (5, 1, 3, 130, 2)], ids=str
)
def test_odd_shapes(sizes):
    both("per-sequence", sizes=sizes)


@modes
def test_gradcheck(mode):
    """By finite differences, of every element where sequences have scales of their own."""
    whole = mode == "per-sequence"
    given = arguments(mode, (2, 2, 2, 2, 2) if whole else (2, 3, 4, 3, 5), torch.float64)
    rows = given[5] if mode == "per-token" else None
    inputs = [t for t in given[:5] if t is not None]
    assert torch.autograd.gradcheck(
        lambda *t: shift.shifted(*t[:4], t[4] if len(t) > 4 else None, rows),
        inputs,
        fast_mode=not whole,
    )


def test_a_gradient_by_a_scale_of_zero_is_not_zero():
    """What a policy learns from: the worth of a module that was not chosen."""
    out, x, A, B, _, _ = arguments("none")
    scale = torch.zeros(3, 19, device=DEVICE, requires_grad=True)
    shift.shifted(out, x, A, B, scale).square().sum().backward()
    found, scale.grad = scale.grad, None
    rows = torch.arange(3, device=DEVICE).repeat_interleave(7)
    reference.shifted(out, x, A, B, scale, rows).square().sum().backward()
    assert scale.grad.abs().min() > 0
    assert_agree([found], [scale.grad], torch.float32)


def test_masked_tiles_are_not_read():
    """Rank rows that no sequence uses may hold anything; they get no gradient."""
    r = 4 * shift.BR
    out, x, A, B, scale, rows = arguments("per-sequence", (3, 7, 37, 21, r), by_scale=False)
    scale[:, shift.BR : 3 * shift.BR] = 0
    dead = slice(shift.BR, 3 * shift.BR)
    kept = torch.cat([torch.arange(shift.BR), torch.arange(3 * shift.BR, r)]).to(DEVICE)
    wanted = reference.shifted(out, x, A[kept], B[:, kept], scale[:, kept], rows)
    with torch.no_grad():
        A[dead], B[:, dead] = math.nan, math.inf
    y = shift.shifted(out, x, A, B, scale)
    assert_agree([y], [wanted], torch.float32)
    dA, dB = torch.autograd.grad(y.sum(), [A, B])
    assert not dA[dead].any() and not dB[:, dead].any()
    assert dA.isfinite().all() and dA[kept].any() and dB[:, kept].any()


def test_nothing_chosen_is_the_layer_alone():
    out, x, A, B, _, _ = arguments("none")
    y = shift.shifted(out, x, A, B, torch.zeros(3, 19, device=DEVICE))
    assert torch.equal(y, out)
    y.sum().backward()
    assert not x.grad.any() and not A.grad.any() and torch.equal(out.grad, torch.ones_like(out))
    empty = shift.shifted(out, x, A[:0], B[:, :0], torch.ones(3, 0, device=DEVICE))
    assert torch.equal(empty, out)


def test_views_and_strides():
    out, x, A, B, _, _ = arguments("none")
    found = shift.shifted(out.mT.contiguous().mT, x[:, :, ::2], A[::2, ::2], B[:, ::2])
    wanted = reference.shifted(out, x[:, :, ::2], A[::2, ::2], B[:, ::2], None, None)
    assert_agree([found], [wanted], torch.float32)


def test_the_same_every_time():
    given = arguments("per-sequence")
    runs = [torch.autograd.grad(shift.shifted(*given[:5]).square().sum(), given[:5])
            for _ in range(2)]  # fmt: skip
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"B": (21, 18)}, r"A \(19, 37\) and B \(21, 18\)"),
        ({"x": (3, 7, 36)}, r"x must be \[..., 37\]"),
        ({"out": (3, 6, 21)}, r"out \[..., 21\], got"),
        ({"scale": (18,)}, r"scale must be \[19\], got \(18,\)"),
        ({"scale": (3, 18)}, r"\[N, r\], r = 19, got \(3, 18\)"),
        ({"scale": (4, 19)}, "21 tokens are not 4 sequences"),
        ({"scale": (3, 19), "rows": (20,)}, r"rows must be int64 \[21\]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments(changed, message):
    sizes = {"out": (3, 7, 21), "x": (3, 7, 37), "A": (19, 37), "B": (21, 19)} | changed
    with pytest.raises(ValueError, match=message):
        shift.shifted(**{name: torch.zeros(size, device=DEVICE) for name, size in sizes.items()})


def test_wrong_dtypes():
    out, x, A, B, _, _ = arguments("none")
    with pytest.raises(ValueError, match="one dtype.*float16.*float32"):
        shift.shifted(out, x, A.half(), B)


def test_the_measurement_runs(capsys, monkeypatch):
    """And reports nothing of a kernel that is wrong."""
    from hiedit_kernels import measure

    measure.main(["--quick"])
    out = capsys.readouterr().out
    assert "of the copy" in out and "times as fast as PyTorch" in out
    monkeypatch.setattr(shift, "shifted", lambda out, *rest: 2 * reference.shifted(out, *rest))
    with pytest.raises(SystemExit, match="off its reference; no speed is reported"):
        measure.main(["--quick"])


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_real_sizes_on_a_gpu(dtype):
    both("per-sequence", dtype, by_scale=False, sizes=(20, 40, 1024, 2048, 160))
