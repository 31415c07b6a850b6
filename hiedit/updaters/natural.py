"""The natural gradient: how an edit's change is shared out over modules and directions.

To first order a shift that changes the output of module ``l`` at the edit's key by ``R_l`` gains
``-sum_l g_l . R_l`` nats. At another key ``k'`` it changes the output by ``(k'^T P k / k^T P k)
R_l``, which costs ``1/2 R_l^T F_l R_l / k^T C^-1 k`` nats on average, where ``C`` is the second
moment of keys and ``F_l`` the Fisher information of the outputs: K-FAC (Martens and Grosse 2015,
arXiv 1503.05671, section 3), which takes the two for independent. The most gain for a given cost is

    R_l  proportional to  -(k^T C^-1 k) F_l^-1 g_l

over all modules together: a module takes much of an edit where its output says much about the
answer and little about everything else, and where its key stands apart from other keys.
Shapes: ``M`` modules of one shape, ``T`` edit tokens, ``E`` edits, ``O`` out features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class NaturalGradient(nn.Module):
    """``F^-1 g`` for the modules of one shape.

    damping: ridge of ``F``, relative to the mean of its diagonal. freedom: power of ``k^T C^-1 k``;
    1 in the formula, more moves an edit further to modules where its key stands apart. Until
    ``fit`` the curvature is the identity.
    """

    def __init__(self, modules: int, features: int, damping: float, freedom: float):
        super().__init__()
        self.damping, self.freedom = damping, freedom
        eye = torch.eye(features).expand(modules, -1, -1)
        self.register_buffer("inverse", (eye / (1 + damping)).clone())

    @torch.no_grad()
    def fit(self, curvature: Tensor) -> None:
        """curvature: [M, O, O], Fisher information of the modules' outputs."""
        eye = torch.eye(curvature.shape[-1], dtype=torch.float64, device=curvature.device)
        for m, found in enumerate(curvature):  # one at a time, as the protection does
            dense = found.double()
            unit = dense.diagonal().mean().clamp(min=1e-30)
            root = torch.linalg.cholesky(dense / unit + self.damping * eye)
            self.inverse[m] = torch.cholesky_inverse(root) / unit

    def forward(self, grads: Tensor, free: Tensor) -> Tensor:
        """[M, T, O], along the natural gradient; grads: [M, T, O]; free: [M, T], the keys'
        ``k^T C^-1 k``."""
        return free.clamp(min=0).pow(self.freedom)[:, :, None] * (grads @ self.inverse)

    def cost(self, grads: Tensor, rows: Tensor, free: Tensor) -> Tensor:
        """[M, T], ``1/2 R^T F R / k^T C^-1 k`` in nats, of ``rows`` as ``forward`` gives them
        [M, T, O] for ``grads`` [M, T, O] and ``free`` [M, T]. ``F`` with its damping."""
        power = free.clamp(min=1e-12).pow(self.freedom - 1)
        return 0.5 * power * (grads * rows).sum(-1).clamp(min=0)


def within(costs: Tensor, live: Tensor, most: float | Tensor) -> Tensor:
    """[E]: what an edit's rows have to be divided by to cost ``most`` nats over the modules that it
    touches; all where it touches none. costs: [L, E], in nats. live: bool [L, E]. most: one number,
    or [E]."""
    live = live | ~live.any(0)
    return (torch.where(live, costs, 0.0).sum(0) / most).sqrt()


def joint_length(lengths: Tensor, live: Tensor) -> Tensor:
    """[E]: root mean square of ``lengths`` [L, E] over the modules that an edit touches.

    live: bool [L, E]; over all modules for an edit that touches none. Never 0, so that it can be
    divided by.
    """
    live = live | ~live.any(0)
    kept = torch.where(live, lengths, 0.0)
    largest = kept.amax(0).clamp(min=1e-20)  # squares of small gradients would be 0 in fp32
    mean = (kept / largest).square().sum(0) / live.sum(0).clamp(min=1)
    return largest * mean.sqrt().clamp(min=1e-20)
