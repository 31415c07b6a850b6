"""Low-rank factors of an accumulated delta, and how far they are from it.

Shape letters: ``O``/``I`` out and in features, ``R`` rank rows that the caller knows of, ``k`` the
rank that is chosen, ``m`` the smaller of two sides. Deltas are seen as [O, I] whatever the layout
of the weight: a ``Conv1D``'s is passed transposed.

A truncation is a projection. With ``U`` the leading ``k`` left singular vectors of the delta,
``B A = U (U^T delta)`` is its best approximation of rank ``k`` (Eckart and Young, 1936), and the
error follows from the spectrum: ``|delta - B A|_F^2 = |delta|_F^2 - |U^T delta|_F^2``. So one
orthonormal basis is all that has to be found, by whichever way is cheapest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Relative errors. A delta is itself a rounded fp32 sum, so below NEGLIGIBLE there is nothing left
# to approximate; ROUNDING is what storing the factors in fp32 and multiplying them adds.
NEGLIGIBLE = 1e-5
ROUNDING = 2e-7
_SKETCH_FROM = 2048  # smaller side from which a small requested rank is found by sketching
_OVERSAMPLE, _POWER = 16, 3
_CHUNK = 1 << 22  # elements of a delta compared at a time


@dataclass(frozen=True)
class LowRank:
    """``delta ~ B A``.

    A: fp32 [k, I]. B: fp32 [O, k].
    exact: nothing was truncated: the caller's own rank rows, or the delta times an identity.
    predicted: the relative Frobenius error that the truncation should have, 0 where exact.
    """

    A: Tensor
    B: Tensor
    exact: bool
    predicted: float = 0.0

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True)
class Errors:
    """Distances over the Frobenius norm of the delta, measured; ``W = round(W_0 + delta)``.

    delta: of ``B A`` from the delta.
    served: of ``W_0 + B A``, the sum left unrounded as an adapter beside the model has it, from W.
    merged: of ``round(W_0 + B A)``, in the weight's dtype, from W.
    """

    delta: float
    served: float
    merged: float


@torch.no_grad()
def factorise(
    delta: Tensor,
    rows: tuple[Tensor, Tensor] | None = None,
    rank: int | None = None,
    max_error: float | None = None,
) -> LowRank:
    """Factors of ``delta``: exact where the rank allows it, else a truncated SVD.

    With neither ``rank`` nor ``max_error``, nothing is given away: the rows themselves, or
    ``delta`` times an identity where that is smaller; only without rows, the smallest rank whose
    error is ``NEGLIGIBLE``. The basis comes from the rows where they are fewer than either side
    (QR of ``B``, spectrum of the small core), from a sketch where a small rank of a large delta is
    asked for, else from the delta. All of that in fp64; no random state is used or changed.

    Args:
        delta: fp32 [O, I], finite, not all zero; may be a transposed view.
        rows: ``(A [R, I], B [O, R])`` with ``B A = delta`` up to rounding, if they are known.
        rank: no more than this.
        max_error: the smallest rank whose relative Frobenius error is at most this. With
            ``rank`` too, the rank is the cap and the error may stay larger.
    """
    full = min(delta.shape)
    cap = full if rank is None else min(rank, full)
    known = full if rows is None else min(rows[0].shape[0], full)  # the true rank is at most this
    if max_error is None and rows is not None and known <= cap:
        return _untruncated(delta, rows, known)
    bound = NEGLIGIBLE if max_error is None else max_error
    flip = delta.shape[0] > delta.shape[1] and known == full  # the basis of the smaller side
    wide = (delta.T if flip else delta).double()
    energies, basis = _spectrum(wide, rows if known < full else None, cap)
    total = float(wide.norm()) ** 2
    tail = (total - energies.cumsum(0)).clamp(min=0) / total
    if len(energies) == known:  # the whole spectrum: summed from its small end it is accurate
        tail = torch.cat([energies.flip(0).cumsum(0).flip(0)[1:], energies.new_zeros(1)]) / total
    k = _smallest(tail.tolist(), bound, cap)
    if k >= known:
        return _untruncated(delta, rows, known)
    basis = basis[:, :k]
    other = (basis.T @ wide).float().contiguous()  # [k, the other side]
    basis = basis.float().contiguous()
    predicted = math.sqrt(tail[k - 1])
    if flip:
        other, basis = basis.T.contiguous(), other.T.contiguous()
    return LowRank(other, basis, False, predicted)


@torch.no_grad()
def measure(delta: Tensor, base: Tensor, low: LowRank) -> Errors:
    """Tell how far ``low`` is from ``delta``, and the weights it makes from the ledger's.

    ``B A`` is computed in fp32, as peft multiplies it when it merges.

    Args:
        delta: fp32 [O, I]; like ``base`` it may be a transposed view.
        base: ``W_0`` [O, I] in the weight's dtype.
    """
    squares = torch.zeros(4, dtype=torch.float64)
    for at in _chunks(delta):
        d, w0 = delta[at], base[at].float()
        product = low.B[at] @ low.A
        weight = (w0 + d).to(base.dtype).float()
        merged = (w0 + product).to(base.dtype).float()
        # (W - W_0) - B A and not W - (W_0 + B A): that sum would be rounded to fp32
        for i, t in enumerate((d, d - product, (weight - w0) - product, weight - merged)):
            squares[i] += float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2
    norms = squares.sqrt()
    return Errors(*(norms[1:] / norms[0]).tolist())


def rounding_of(delta: Tensor, rows: tuple[Tensor, Tensor]) -> float:
    """Tell how far, relative to ``delta``, rounding alone can take the sum of ``R`` rows from it.

    Each of the ``R`` fused steps errs by at most 2^-24 of a partial sum, which is no larger than
    ``sum_r |B_r| |A_r|``; the product it is compared with errs as much, and twice that is allowed.
    """
    A, B = rows
    size = float((B.double().norm(dim=0) * A.double().norm(dim=1)).sum())
    return (
        4
        * (A.shape[0] + 1)
        * 2.0**-24
        * size
        / float(torch.linalg.vector_norm(delta, dtype=torch.float64))
    )


def _untruncated(delta: Tensor, rows: tuple[Tensor, Tensor] | None, known: int) -> LowRank:
    O, I = delta.shape  # noqa: E741
    if rows is not None and known < min(O, I):
        return LowRank(rows[0].float().contiguous(), rows[1].float().contiguous(), True)
    eye = torch.eye(min(O, I), device=delta.device)  # products with 0 and 1 lose nothing
    whole = delta.clone(memory_format=torch.contiguous_format)
    return LowRank(whole, eye, True) if O <= I else LowRank(eye, whole, True)


def _smallest(tail: list[float], bound: float, cap: int) -> int:
    """The smallest rank of at most ``cap`` whose squared error ``tail[rank - 1]`` is in bounds."""
    allowed = bound * bound - ROUNDING * ROUNDING  # leaves room for the rounding of the factors
    met = (k for k, error in enumerate(tail[:cap], 1) if error <= allowed)
    return next(met, cap)


def _spectrum(delta: Tensor, rows: tuple[Tensor, Tensor] | None, cap: int) -> tuple[Tensor, Tensor]:
    """Squared singular values [n], falling, and left singular vectors [O, n] of an fp64 delta.

    n is R with rows, else O; no more than is needed for ``cap`` where a sketch is enough.
    """
    if rows is not None:
        A, B = rows
        q, triangle = torch.linalg.qr(B.double())
        return _rotated(q, triangle @ A.double())
    if len(delta) >= _SKETCH_FROM and (cap + _OVERSAMPLE) * 4 <= len(delta):
        q = _range(delta, cap + _OVERSAMPLE)
        return _rotated(q, q.T @ delta)
    return _rotated(None, delta)


def _rotated(q: Tensor | None, core: Tensor) -> tuple[Tensor, Tensor]:
    """The spectrum of ``q core`` with orthonormal columns q, from the Gram matrix of ``core``.

    Squaring costs the singular values below 1e-8 of the largest, which ``NEGLIGIBLE`` does not
    reach; an eigendecomposition of the smaller side is several times faster than an SVD.
    """
    energies, vectors = torch.linalg.eigh(core @ core.T)
    energies, vectors = energies.flip(0).clamp(min=0), vectors.flip(1)
    return energies, vectors if q is None else q @ vectors


def _range(delta: Tensor, n: int) -> Tensor:
    """[O, n] orthonormal, close to the leading left singular vectors: subspace iteration.

    Source: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53(2),
    2011, algorithm 4.4. The generator is seeded, so that an export can be repeated.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(delta.shape[1], n, generator=generator, dtype=delta.dtype)
    q = torch.linalg.qr(delta @ start.to(delta.device)).Q
    for _ in range(_POWER):
        q = torch.linalg.qr(delta.T @ q).Q
        q = torch.linalg.qr(delta @ q).Q
    return q


def _chunks(t: Tensor) -> Iterator[slice]:
    """Row ranges of about ``_CHUNK`` elements: no temporary of the size of a large weight."""
    step = max(_CHUNK // t.shape[1], 1)
    return (slice(start, start + step) for start in range(0, len(t), step))
