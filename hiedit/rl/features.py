"""Features of each module that a policy may see beside keys and gradients: what earlier edits have
left in it, and what this edit's shift would do, from factors alone.

Shapes: ``E`` edits, ``T`` edit tokens, ``L`` modules, ``r`` rank, ``F`` features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hiedit.rl.environment import Environment
from hiedit.rl.objective import squared_norm
from hiedit.types import Shifts, Signals
from hiedit.updaters.updater import Updater

SMALLEST = 1e-12  # below which a gain or a cost counts as none


@torch.no_grad()
def first_order_gain(signals: Signals, shifts: Shifts, names: list[str]) -> Tensor:
    """[E, L]: ``-<G_l, delta_W_l K_l>``, the fall of the edit loss to first order if a module took
    its whole shift (nats); 0 where there is none."""
    edits = len(signals.loss)
    columns = []
    for name in names:
        column = signals.loss.new_zeros(edits)
        if name in shifts:
            shift = shifts[name]
            k, g = signals.keys[name] @ shift.A.T, signals.grads[name] @ shift.B
            column = column.index_add(0, signals.edit, -(k * g).sum(-1))
        columns.append(column)
    return torch.stack(columns, -1)


@torch.no_grad()
def module_costs(updater: Updater, shifts: Shifts) -> Tensor:
    """[L]: the energy of each shift on preserved prompts; its squared norm where the updater
    protects nothing. Edits of one step share it."""
    if updater.config.protects:
        return updater.energy(shifts)
    zero = next(updater.parameters()).new_zeros(())
    return torch.stack([squared_norm({n: shifts[n]}) if n in shifts else zero
                        for n in updater.names])  # fmt: skip


@torch.no_grad()
def gain_over_energy(updater: Updater, signals: Signals) -> Tensor:
    """[E, L]: first-order gain over root energy, what one unit of disturbance buys."""
    ones = torch.ones(len(signals.loss), len(updater.names), device=signals.loss.device)
    shifts = updater(signals, ones)
    cost = module_costs(updater, shifts).clamp(min=1e-20).sqrt()
    return first_order_gain(signals, shifts, updater.names) / cost


class StateFeatures:
    """[E, L, F]: the chosen ``features`` of every module, in their order.

    fullness: norm of what the committed edits have added, over that of the base weights; one
    pass over the accumulators after a commit, however many edits came before. collision: of the
    edit's keys with protected ones, preserved and of earlier edits, mean over its tokens;
    ``1 - eps k^T P k / k^T k``, 0 where nothing protected points along the key, near 1 where it is
    protected as well as can be. gain: log of the first-order gain (nats) if the module took its
    whole shift. cost: log of the shift's energy on preserved prompts (of its squared norm where
    nothing is protected).
    """

    def __init__(self, env: Environment, updater: Updater, features: Sequence[str]):
        self.env, self.updater, self.features = env, updater, tuple(features)
        parted = [n for n, m in env.backbone.modules.items() if _parted(m)]
        if "fullness" in self.features and parted:
            raise ValueError(
                f"method.selector.features={list(features)!r}: 'fullness' of a sharded module "
                f"({parted[0]}) is not computed; leave it out"
            )
        self._fullness: tuple[int, Tensor] | None = None  # of which version of the weights
        self._base: dict[str, tuple[Tensor, Tensor]] = {}  # weights before any edit, their norm

    @torch.no_grad()
    def __call__(self, signals: Signals) -> Tensor:
        """Return what the policy is told of ``signals``' edits, under the committed weights."""
        edits, found = len(signals.loss), {}
        if {"gain", "cost"} & set(self.features):
            names = self.updater.names
            every = torch.ones(edits, len(names), device=signals.loss.device)
            shifts = self.updater(signals, every)
            gain = first_order_gain(signals, shifts, names)
            found["gain"] = gain.clamp(min=SMALLEST).log()
            cost = module_costs(self.updater, shifts).clamp(min=SMALLEST).log()
            found["cost"] = cost.expand(edits, -1)
        if "collision" in self.features:
            found["collision"] = self.updater.collision(signals)
        if "fullness" in self.features:
            found["fullness"] = self._full().to(signals.loss.device).expand(edits, -1)
        return torch.stack([found[f] for f in self.features], -1)

    def _full(self) -> Tensor:
        """[L]."""
        version, state = self.env.version, self.env.state
        if self._fullness is None or self._fullness[0] != version:
            full = [self._share(name, state) for name in self.updater.names]
            self._fullness = version, torch.stack(full)
        return self._fullness[1]

    def _share(self, name: str, state) -> Tensor:
        acc = state.acc.get(name)
        if acc is None:
            return torch.zeros(())
        base, norm = self._base.get(name, (None, None))
        if base is not state.base[name]:
            base = state.base[name]
            norm = base.float().norm().clamp(min=SMALLEST)
            self._base[name] = base, norm
        return (acc.norm() / norm).cpu()


def _parted(module) -> bool:
    """Tell whether only a range of the module's weight is here."""
    return module.span != (0, module.in_features * module.out_features)
