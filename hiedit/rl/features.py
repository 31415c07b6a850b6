"""What an edit's shifts would do to each module, from factors alone.

Shapes: ``E`` edits, ``T`` edit tokens, ``L`` modules, ``r`` rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hiedit.rl.objective import squared_norm
from hiedit.types import Shifts, Signals
from hiedit.updaters.updater import Updater


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
    if updater.config.solver == "protected":
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
