"""Order-exact accumulation of shifts, and rounding of the result into weights.

The ledger promises that the edited weights are a pure function of the base weights and the ordered
set of active edits: ``W = round(W_0 + acc)``, same bits whichever path led there. This file
defines the arithmetic behind the promise, in PyTorch; ``csrc/`` computes the same bits faster.

For every element (o, i) of a weight and every rank row r whose scale is not 0, in order of r::

    b   = B[o, r] * scale[r]             rounded to fp32 (B[o, r] itself without a scale)
    acc = fma(b, A[r, i], acc)           one rounding, to fp32, subnormals kept

and then ``W = round_to_nearest_even(W_0 + acc)``: the sum in fp32, rounded to W's dtype, except
that W takes W_0's own bits where acc is zero. (-0.0 + 0.0 is +0.0: without the exception, reverting
every edit would not restore a negative zero.) Only the payload of a NaN is left open.

Shape letters: ``O``/``I`` out and in features, ``r`` rank, ``R``/``C`` rows and columns of the
weight as stored: [O, I] for ``nn.Linear``, [I, O] for ``Conv1D``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hiedit.ledger.dispatch import BACKENDS as BACKENDS
from hiedit.ledger.dispatch import choose, launch
from hiedit.ledger.update import Update as Update

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CHUNK = 1 << 15  # elements at a time in the reference: its fp64 temporaries stay in the cache


@torch.no_grad()
def accumulate_(
    acc: Tensor,
    A: Tensor,
    B: Tensor,
    scale: Tensor | None = None,
    *,
    start: int = 0,
    end: int | None = None,
    conv1d: bool = False,
    threads: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Adds ``B diag(scale) A`` to ``acc`` in place, in the canonical order, and returns ``acc``.

    Args:
        acc: fp32, contiguous, any shape: the whole weight ([O, I], or [I, O] with ``conv1d``), or
            exactly the ``end - start`` elements of its flat range, as a ZeRO shard holds them.
        A: [r, I], fp32, or bf16 or fp16 (widened exactly).
        B: [O, r], likewise.
        scale: [r] or None for all ones; rank rows with scale 0 are skipped altogether.
        start, end: flat range of the row-major weight to update; ``end`` None means its end.
        conv1d: the weight is stored [I, O], as in transformers' ``Conv1D``.
        threads: at most this many (0: torch's number). No effect on the result.
        backend: one of ``BACKENDS``; None means the environment's ``HIEDIT_BACKEND``, else auto.

    Raises:
        ValueError: for shapes, dtypes or a range that do not fit, or an unknown backend.
        RuntimeError: if the backend asked for is not available, with the remedy.
    """
    _check_dtypes(A, B, scale)
    end = A.shape[-1] * B.shape[0] if end is None else end
    _check_accumulate(acc, A, B, scale, start, end)
    chosen = choose(backend, acc)
    if chosen in ("triton", "cuda"):
        launch(chosen, [Update(acc, A, B, scale)], start=start, end=end, conv1d=conv1d)
        return _touched(acc)
    A, B, scale = _widened(A, B, scale)
    if chosen == "cpp":
        torch.ops.hiedit.accumulate_(acc, A, B, scale, start, end, conv1d, threads)
    else:
        _accumulate_reference(acc, A, B, scale, start, end, conv1d)
    return _touched(acc)


@torch.no_grad()
def materialize_(
    weight: Tensor,
    base: Tensor,
    acc: Tensor,
    *,
    start: int = 0,
    end: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Writes ``round_to_nearest_even(base + acc)`` to ``weight`` and returns it.

    Args:
        weight: bf16, fp16 or fp32, contiguous. Each of the three tensors holds either a whole
            weight or exactly the elements [start, end) of one.
        base: W_0, of ``weight``'s dtype; may be ``weight`` itself.
        acc: fp32.
        start, end: flat range; ``end`` None means all of ``weight``.
        backend: as in ``accumulate_``.

    Raises:
        ValueError, RuntimeError: as ``accumulate_``.
    """
    end = start + weight.numel() if end is None else end
    _check_materialize(weight, base, acc, start, end)
    chosen = choose(backend, weight)
    if chosen in ("triton", "cuda"):
        launch(chosen, [Update(acc, weight=weight, base=base)], start=start, end=end)
    elif chosen == "cpp":
        torch.ops.hiedit.materialize_(weight, base, acc, start, end)
    else:
        _materialize_reference(weight, base, acc, start, end)
    return _touched(weight)


@torch.no_grad()
def commit_(
    weight: Tensor,
    base: Tensor,
    acc: Tensor,
    A: Tensor,
    B: Tensor,
    scale: Tensor | None = None,
    *,
    start: int = 0,
    end: int | None = None,
    conv1d: bool = False,
    threads: int = 0,
    backend: str | None = None,
) -> Tensor:
    """``accumulate_`` and then ``materialize_``, bit for bit, in one pass over memory.

    Returns ``weight``. Arguments and errors are those of the two; every error is raised before
    ``acc`` or ``weight`` is touched.
    """
    update = Update(acc, A, B, scale, weight, base)
    options = {"start": start, "end": end, "conv1d": conv1d, "threads": threads}
    commit_group_([update], **options, backend=backend)
    return weight


@torch.no_grad()
def commit_group_(
    updates: Sequence[Update],
    mask: Tensor | None = None,
    *,
    start: int = 0,
    end: int | None = None,
    conv1d: bool = False,
    threads: int = 0,
    backend: str | None = None,
) -> None:
    """``commit_`` of several modules of one shape, dtype and device: one launch on a GPU.

    Args:
        updates: with factors and weights; ranks and dtypes of factors may differ.
        mask: [L], any dtype, on the device; modules with 0 stay untouched and cost nothing. It is
            not looked at on the host where a GPU does the work.
        start, end, conv1d, threads, backend: as in ``commit_``, for every module.

    Raises:
        ValueError, RuntimeError: as ``commit_``, and if the updates do not belong together or the
            mask does not fit; before anything is touched.
    """
    if not updates:
        return
    first = updates[0]
    if end is None and first.A is not None and first.B is not None:
        end = first.A.shape[-1] * first.B.shape[0]
    _check_group(updates, mask, start, end)
    chosen = choose(backend, first.acc)
    if chosen in ("triton", "cuda"):
        launch(chosen, updates, mask, start=start, end=end, conv1d=conv1d)
    else:
        kept = [True] * len(updates) if mask is None else mask.bool().tolist()
        for u in (update for update, keep in zip(updates, kept, strict=True) if keep):
            factors = _widened(u.A, u.B, u.scale)
            if chosen == "cpp":
                arguments = (*factors, start, end, conv1d, threads)
                torch.ops.hiedit.commit_(u.weight, u.base, u.acc, *arguments)
            else:
                _accumulate_reference(u.acc, *factors, start, end, conv1d)
                _materialize_reference(u.weight, u.base, u.acc, start, end)
    for update in updates:
        _touched(update.acc)
        _touched(update.weight)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` of fp32 tensors with a single rounding, to nearest even: the C99 ``fmaf``.

    The product of two fp32 numbers is exact in fp64 (48 bits of 53, and no exponent leaves the
    range), the fp64 sum is not, and rounding it a second time to fp32 could land on the wrong side
    of a tie. So the sum is rounded to odd first: wherever it was inexact, its last bit is set,
    which no tie between fp32 numbers, subnormal ones included, can have. Source: Boldo and
    Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to
    odd", IEEE Transactions on Computers 57(4), 2008.
    """
    p, c = a.double() * b.double(), c.double()
    total = p + c
    c_part = total - p  # Knuth's TwoSum: `lost` is the rounding error of `total`, exactly
    lost = (p - (total - c_part)) + (c - c_part)
    bits = total.view(torch.int64)
    inexact = (lost != 0) & total.isfinite() & (bits & 1 == 0)
    # One step towards the exact sum: up in magnitude if the loss has the sign of the total.
    step = torch.where((lost > 0) == (total > 0), 1, -1)
    return torch.where(inexact, bits + step, bits).view(torch.float64).float()


def _accumulate_reference(acc, A, B, scale, start, end, conv1d):
    """The definition of ``accumulate_``: rank rows in order, rectangles of whole rows at a time."""
    if scale is not None:
        kept = scale.nonzero().squeeze(-1)
        A, B = A[kept], B[:, kept] * scale[kept]
    by_row, by_column = (A.T, B.T) if conv1d else (B, A)  # [R, r], [r, C]
    columns = by_column.shape[1]
    flat = _range(acc, start, end)
    for row, rows, left, right in _rectangles(start, end, columns):
        at = row * columns + left - start
        size = rows * (right - left)
        part = flat[at : at + size].view(rows, right - left)
        value = part
        for k in range(A.shape[0]):
            value = fma(by_row[row : row + rows, k, None], by_column[k, left:right], value)
        part.copy_(value)


def _materialize_reference(weight, base, acc, start, end):
    """The definition of ``materialize_``."""
    w, w0, a = (_range(t, start, end) for t in (weight, base, acc))
    for part in range(0, w.numel(), _CHUNK):  # no temporary of the weight's size
        at = slice(part, part + _CHUNK)
        rounded = (w0[at].float() + a[at]).to(w.dtype)
        w[at] = torch.where(a[at] == 0, w0[at], rounded)


def _rectangles(start: int, end: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """(first row, number of rows, left, right) covering a flat range, at most _CHUNK each."""
    most = max(_CHUNK // max(columns, 1), 1)
    while start < end:
        row, left = divmod(start, columns)
        whole = (end - start) // columns
        if left or not whole:
            rows, right = 1, min(columns, left + end - start)
        else:
            rows, right = min(whole, most), columns
        yield row, rows, left, right
        start += rows * (right - left)


def _range(t: Tensor, start: int, end: int) -> Tensor:
    """The elements [start, end) of ``t``, flat: part of a whole weight, or a shard as it is."""
    flat = t.view(-1)
    return flat if flat.numel() == end - start else flat[start:end]


def _touched(t: Tensor) -> Tensor:
    """Tells autograd that ``t`` changed: operators of an extension do not count versions."""
    if not t.is_inference():
        torch.autograd.graph.increment_version(t)
    return t


def _check_dtypes(A, B, scale):
    for name, t in (("A", A), ("B", B), ("scale", scale)):
        if t is not None and t.dtype not in DTYPES:
            raise ValueError(f"{name} is {t.dtype}: factors must be float32, bfloat16 or float16")


def _widened(*factors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.float() for t in factors)


def _check_group(updates, mask, start, end):
    first = updates[0]
    for u in updates:
        missing = [n for n in ("A", "B", "weight", "base") if getattr(u, n) is None]
        if missing:
            raise ValueError(f"a commit needs {', '.join(missing)} of every module")
        _check_dtypes(u.A, u.B, u.scale)
        _check_accumulate(u.acc, u.A, u.B, u.scale, start, end)
        _check_materialize(u.weight, u.base, u.acc, start, end)
        one, other = ((x.B.shape[0], x.A.shape[1], x.weight.dtype) for x in (first, u))
        if one != other:
            raise ValueError(
                f"the modules of one commit must share (O, I) and dtype, got {one} and {other}"
            )
        parts = (u.acc, u.A, u.B, u.weight, u.base, u.scale)
        if any(t is not None and t.device != first.acc.device for t in parts):
            found = sorted({str(t.device) for t in parts if t is not None})
            raise ValueError(f"one commit is on one device, {first.acc.device}, got {found}")
    if mask is not None and (mask.shape != (len(updates),) or mask.device != first.acc.device):
        raise ValueError(
            f"mask must be [{len(updates)}] on {first.acc.device}, "
            f"got {tuple(mask.shape)} on {mask.device}"
        )


def _check_accumulate(acc, A, B, scale, start, end):
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(
            f"A must be [r, I] and B [O, r], got A {tuple(A.shape)} and B {tuple(B.shape)}"
        )
    if scale is not None and scale.shape != A.shape[:1]:
        raise ValueError(f"scale must be [r] = [{A.shape[0]}], got {tuple(scale.shape)}")
    total = A.shape[1] * B.shape[0]
    if not 0 <= start <= end <= total:
        raise ValueError(f"range [{start}, {end}) is not within the weight's [0, {total})")
    if acc.dtype != torch.float32 or not acc.is_contiguous():
        raise ValueError(f"acc must be contiguous float32, got {acc.dtype}, strides {acc.stride()}")
    if acc.numel() not in (total, end - start):
        raise ValueError(
            f"acc has {acc.numel()} elements: it must hold the weight's {total} "
            f"or the range's {end - start}"
        )


def _check_materialize(weight, base, acc, start, end):
    if weight.dtype not in DTYPES or base.dtype != weight.dtype or acc.dtype != torch.float32:
        raise ValueError(
            f"weight and base must share one of {DTYPES} and acc be float32, "
            f"got {weight.dtype}, {base.dtype}, {acc.dtype}"
        )
    if not 0 <= start <= end:
        raise ValueError(f"range [{start}, {end}) is not a range")
    for name, t in (("weight", weight), ("base", base), ("acc", acc)):
        if not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {t.stride()}")
        if t.numel() != end - start and t.numel() < end:
            raise ValueError(
                f"{name} has {t.numel()} elements: neither the range [{start}, {end}) "
                "nor a weight around it"
            )
