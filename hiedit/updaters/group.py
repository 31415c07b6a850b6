"""The updater of all modules of one shape, in one batch.

Shapes: ``M`` modules of one shape, ``T`` edit tokens, ``E`` edits, ``I``/``O`` features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hiedit.backbone.normalise import RunningNorm
from hiedit.updaterconfig import UpdaterConfig
from hiedit.updaters.averaging import averaged
from hiedit.updaters.hypernetwork import Hypernetwork
from hiedit.updaters.natural import NaturalGradient
from hiedit.updaters.protection import Protection
from hiedit.updaters.solvers import (
    least_squares,
    outer_product,
    protected_least_squares,
    ridge_regression,
)


class ShapeGroup(nn.Module):
    """The updater of all ``M`` modules of one shape, computed in one batch."""

    def __init__(self, names: list[str], shape: tuple[int, int], config: UpdaterConfig):
        super().__init__()
        self.names, self.config = names, config
        m, (i, o) = len(names), shape
        self.key_norm = RunningNorm(m, i, config.clamp)
        self.grad_norm = RunningNorm(m, o, config.clamp)
        learned = config.learned
        self.log_eta = nn.Parameter(torch.full((m,), math.log(config.eta)), learned)
        self.log_lam = nn.Parameter(torch.full((m,), math.log(config.lam)), learned)
        self.net = (
            Hypernetwork(m, i, o, config.rank, config.blocks, config.per_module)
            if learned
            else None
        )
        protects = config.protects
        # What a typical output of each module is, for solvers that are not told it otherwise.
        relative = config.step == "relative" and not protects
        self.register_buffer("power", torch.ones(m) if relative else None)
        self.protection = (
            Protection(m, i, config.eps, config.absorb, config.phrasing) if protects else None
        )
        natural = config.step == "natural"
        self.natural = NaturalGradient(m, o, config.damping, config.freedom) if natural else None

    def pseudo(self, keys: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
        """(K' [M, T, I], G' [M, T, O]): normalised, or raw plus the hypernetwork's change."""
        if self.config.normalise == "none" and self.net is None:
            return keys, grads
        k, g = self.key_norm(keys), self.grad_norm(grads)
        k2, g2 = self.net(k, g) if self.net is not None else (k, g)
        if self.config.normalise == "running":
            return k2, g2
        key_std, grad_std = self.key_norm.std[:, None], self.grad_norm.std[:, None]
        return keys + (k2 - k) * key_std, grads + (g2 - g) * grad_std

    def solve(
        self,
        keys: Tensor,
        grads: Tensor,
        live: Tensor,
        edit: Tensor,
        pseudo: tuple[Tensor, Tensor] | None = None,
        joint: Tensor | None = None,
        directions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(A [M, T, I], R [M, T, O]) with ``delta_W^T = A^T R``; live: bool [M, T], edit: [T].

        pseudo: in place of ``self.pseudo(keys, grads)``. joint: [E], of steps that modules take
        together. directions: [M, T, I], ``P`` times the pseudo-keys, where they are known.
        """
        pseudo_keys, pseudo_grads = pseudo or self.pseudo(keys, grads)
        eta, lam = self.log_eta.exp(), self.log_lam.exp()
        if self.config.solver == "outer":
            if self.power is None:
                return outer_product(pseudo_keys, pseudo_grads, eta)
            a, r = outer_product(pseudo_keys, pseudo_grads, torch.ones_like(eta))
            own = (keys @ a.mT) * (edit[:, None] == edit)  # other edits' tokens are not its doing
            return a, self._relative(r, own @ r, edit, eta)
        if self.config.solver == "least_squares":
            if self.power is None:
                return least_squares(keys, pseudo_keys, pseudo_grads, eta, lam, live)
            wanted = -(keys * pseudo_keys).sum(-1, keepdim=True) * pseudo_grads
            return ridge_regression(keys, self._relative(wanted, wanted, edit, eta), lam, live)
        step = self._step(pseudo_grads, edit) if joint is None else pseudo_grads / joint[edit, None]
        target = -eta[:, None, None] * step
        if directions is None:
            directions = pseudo_keys @ self.protection.precision
        return protected_least_squares(pseudo_keys, target, lam, directions, live)

    def _step(self, grads: Tensor, edit: Tensor) -> Tensor:
        """Each edit's longest gradient gets the length of a typical output, whatever its batch."""
        if self.config.step == "gradient":
            return grads
        longest = _longest(grads, edit)
        return grads * (self.protection.power.sqrt()[:, None] / longest)[:, :, None]

    def joint(self, keys: Tensor, grads: Tensor, edit: Tensor) -> tuple[Tensor, ...]:
        """(W [M, T, O], lengths [M, E], costs [M, E], P K [M, T, I]): natural gradients at
        pseudo-keys [M, T, I], each edit's longest against a typical output, what its dearest is
        expected to cost at another token, in nats, if the output changes by as much, and what
        ``solve`` need not compute again."""
        protection = self.protection
        directions = through(protection.precision, keys)
        free = (directions * keys).sum(-1) / protection.unit[:, None]
        free = averaged(free[:, :, None], edit, torch.ones_like(edit, dtype=torch.bool))[:, :, 0]
        rows = self.natural(grads, free)
        lengths = _by_edit(rows, edit) / protection.power.sqrt()[:, None]
        return rows, lengths, _largest(self.natural.cost(grads, rows, free), edit), directions

    def _relative(self, rows: Tensor, change: Tensor, edit: Tensor, eta: Tensor) -> Tensor:
        """``rows`` [M, T, O], scaled for each edit so that the longest of its changes of the
        outputs, ``change`` [M, T, O], is ``eta`` times as long as a typical output."""
        length = (eta * self.power.sqrt())[:, None] / _longest(change.detach(), edit)
        return rows * length[:, :, None]


def through(precision: Tensor, keys: Tensor) -> Tensor:
    """``K P`` [M, T, I]. Keys that are all the same, as means over one edit's sequences are, go
    through ``P`` as one: it takes a third of the time."""
    first = keys[:, :1]
    if keys.shape[1] > 1 and bool((keys.detach() == first.detach()).all()):
        return (first @ precision).expand_as(keys).contiguous()
    return keys @ precision


def _longest(rows: Tensor, edit: Tensor) -> Tensor:
    """[M, T]: the largest norm of any row [M, T, O] of the token's edit."""
    return _by_edit(rows, edit)[:, edit].clamp(min=1e-20)


def _by_edit(rows: Tensor, edit: Tensor) -> Tensor:
    """[M, E]: the largest norm of any row [M, T, O] of each edit."""
    return _largest(rows.norm(dim=-1), edit)


def _largest(values: Tensor, edit: Tensor) -> Tensor:
    """[M, E]: the largest of each edit's ``values`` [M, T], which are not negative."""
    most = values.new_zeros(len(values), int(edit.max()) + 1)
    return most.scatter_reduce(1, edit.expand_as(values), values, "amax")
