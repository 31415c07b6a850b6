"""The memory of a method that edits, apart from the weights: running statistics of signals and
the keys of earlier edits. Kept, so that an editor that is opened again goes on where it stopped.

Shapes: ``M`` modules of one shape, ``T`` edit tokens, ``I`` in features, ``L`` modules in all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hiedit.backbone.normalise import RunningNorm
from hiedit.types import Signals
from hiedit.updaters.protection import Protection
from hiedit.updaters.updater import Updater


def keys_to_keep(updater: Updater, signals: Signals, mask: Tensor) -> dict[str, Tensor]:
    """Return, by module, the keys [T, I] that ``Updater.absorb`` protects after an edit under
    ``mask`` [E, L]; nothing where the method protects nothing."""
    kept, mask = {}, updater.protects(mask)
    for group in updater.groups:
        for name in group.names if group.protection is not None else ():
            live = mask[:, updater.names.index(name)][signals.edit] != 0
            if bool(live.any()):
                kept[name] = signals.keys[name][live].float().cpu()
    return kept


def absorb_kept(updater: Updater, kept: Mapping[str, Tensor]) -> None:
    """Protect what ``keys_to_keep`` kept of one edit, as when it was committed."""
    for group in updater.groups:
        names = [n for n in group.names if n in kept]
        if group.protection is None or not names:
            continue
        device = group.protection.precision.device
        tokens = max(len(kept[n]) for n in names)
        features = group.protection.moment.shape[-1]
        keys = torch.zeros(len(group.names), tokens, features, device=device)
        live = torch.zeros(len(group.names), tokens, dtype=torch.bool, device=device)
        for name in names:
            row, count = group.names.index(name), len(kept[name])
            keys[row, :count], live[row, :count] = kept[name].to(device), True
        group.protection.absorb(keys, live)


def statistics(part: nn.Module) -> dict[str, Tensor]:
    """Copies of the running statistics inside ``part``, by name: small."""
    return {
        f"{place}.{name}": buffer.clone()
        for place, module in part.named_modules()
        if isinstance(module, RunningNorm)
        for name, buffer in module.named_buffers(recurse=False)
    }


def lifelong_state(part: nn.Module) -> dict[str, Tensor]:
    """``statistics`` and the precisions of protected keys [M, I, I]: all that editing changes."""
    precisions = {
        f"{place}.precision": module.precision.clone()
        for place, module in part.named_modules()
        if isinstance(module, Protection)
    }
    return statistics(part) | precisions


def load_lifelong_state(part: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what ``statistics`` or ``lifelong_state`` gave, for a part of the same shape.

    Raises:
        ValueError: for a name or a shape that ``part`` does not have; nothing was changed.
    """
    buffers = dict(part.named_buffers())
    for name, value in state.items():
        if name not in buffers or buffers[name].shape != value.shape:
            has = f"{tuple(buffers[name].shape)}" if name in buffers else "no such buffer"
            raise ValueError(f"{name} {tuple(value.shape)} does not fit this method: it has {has}")
    for name, value in state.items():
        buffers[name].copy_(value)
