"""Solvers: pseudo-keys and pseudo-gradients in, low-rank shifts of one shape's modules out.

Shapes: ``M`` modules of one shape, ``T`` edit tokens (the rank of the shift), ``I``/``O``
features. Every solver returns ``(A [M, T, I], R [M, T, O])`` with ``delta_W^T = A^T R``, in
LoRA's naming ``A = A`` and ``B = R^T``. ``live`` is bool [M, T]: tokens of edits that this module
leaves out take no part in its solve, so an edit's shift does not depend on edits that do not
touch the module.
"""

from __future__ import annotations

import torch
from torch import Tensor

RESCUE = 256  # roundings of a trace


def outer_product(keys: Tensor, grads: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
    """MEND (Mitchell et al. 2022, eq. 2): ``delta_W^T = -eta K'^T G'``.

    keys: pseudo-keys [M, T, I]. grads: pseudo-gradients [M, T, O]. eta: [M].
    """
    return keys, -eta[:, None, None] * grads


def least_squares(
    keys: Tensor, pseudo_keys: Tensor, grads: Tensor, eta: Tensor, lam: Tensor, live: Tensor
) -> tuple[Tensor, Tensor]:
    """MALMEN (Tan et al. 2024, eq. 4): the ridge regression of value differences on keys.

    ``D = -eta (K . K')_row G'`` and ``delta_W^T = (K^T K + lam I)^-1 K^T D``, computed as
    ``K^T (K K^T + lam I)^-1 D``: a T x T solve whose result has rank T.
    keys, pseudo_keys: [M, T, I]. grads: [M, T, O]. eta, lam: [M].
    """
    target = -eta[:, None, None] * (keys * pseudo_keys).sum(-1, keepdim=True) * grads
    return ridge_regression(keys, target, lam, live)


def ridge_regression(
    keys: Tensor, target: Tensor, lam: Tensor, live: Tensor
) -> tuple[Tensor, Tensor]:
    """``delta_W^T = K^T (K K^T + lam I)^-1 D`` for wanted changes ``D`` [M, T, O] of the outputs
    at ``keys`` [M, T, I]; lam: [M]."""
    return keys, _ridge(keys @ keys.mT, target, lam, live)


def protected_least_squares(
    keys: Tensor, target: Tensor, lam: Tensor, directions: Tensor, live: Tensor
) -> tuple[Tensor, Tensor]:
    """Least squares that keeps out of the way of protected keys.

    ``U = P K^T``, ``V = (K P K^T + lam d I)^-1 D`` with ``d`` the mean diagonal of ``K P K^T``;
    ``P = (C / c + eps I)^-1`` is large where no protected key points (Woodbury form of
    ``min ||K X - D||^2 + lam d tr(X^T P^-1 X)``, whose dense solution the tests compare).
    keys: [M, T, I]. target ``D``: [M, T, O], wanted change of the module's outputs.
    lam: [M]. directions: ``U`` [M, T, I], the keys times ``P``.
    """
    gram = directions @ keys.mT
    return directions, _ridge(gram, target, lam * mean_diagonal(gram, live), live)


def mean_diagonal(gram: Tensor, live: Tensor) -> Tensor:
    """[M]: mean of the diagonal of ``gram`` [M, T, T] over the live tokens, 0 if there are none."""
    diagonal = torch.where(live, gram.diagonal(dim1=-2, dim2=-1), gram.new_zeros(()))
    return diagonal.sum(-1) / live.sum(-1).clamp(min=1)


def _ridge(gram: Tensor, target: Tensor, lam: Tensor, live: Tensor) -> Tensor:
    """``(gram + lam I)^-1 target`` over the live tokens; rows of the others are zero."""
    both = live[:, :, None] & live[:, None, :]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # Never below the rounding error of the largest eigenvalue, which the trace bounds: without that
    # repeated tokens, however many, would make the system singular. Where ``lam`` is above it, it
    # is left alone: many tokens of an honest ridge must not be shrunk.
    trace = (mean_diagonal(gram.detach(), live) * live.sum(-1)).clamp(min=1e-12)
    floor = 4 * torch.finfo(gram.dtype).eps * trace
    ridge = torch.maximum(lam, floor)[:, None, None] * eye
    system = torch.where(both, gram, torch.zeros_like(gram)) + ridge
    return solve_spd(system, target * live[:, :, None])


def solve_spd(system: Tensor, target: Tensor) -> Tensor:
    """``system^-1 target`` for symmetric positive definite [M, T, T] and [M, T, O].

    By Cholesky: half the work of LU, and a system that rounding has made indefinite becomes NaN
    (which the updater leaves out) instead of an exception in the middle of a stream. How far
    rounding goes depends on the machine's BLAS, so such a system is tried once more with a ridge of
    ``RESCUE`` roundings of its trace, which bounds its largest eigenvalue.
    """
    factor, info = torch.linalg.cholesky_ex(system)
    if not bool((info != 0).any()):
        return torch.cholesky_solve(target, factor)
    eye = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
    trace = system.detach().diagonal(dim1=-2, dim2=-1).sum(-1)
    ridge = torch.where(info != 0, RESCUE * torch.finfo(system.dtype).eps * trace, 0.0)
    system = system + ridge[:, None, None] * eye
    failed = (torch.linalg.cholesky_ex(system.detach()).info != 0)[:, None, None]
    # Solved again without the failed ones: a NaN inside the graph would reach every gradient.
    factor = torch.linalg.cholesky(torch.where(failed, eye, system))
    return torch.where(failed, torch.nan, torch.cholesky_solve(target, factor))
