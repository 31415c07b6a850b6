"""Editable modules whose committed edits are kept in the host's memory, not the device's.

A commit needs W_0 and an fp32 sum of shifts beside every weight: a quarter of an 8B model in bf16.
Here both live on the host, with a copy of the weight that commits write to; the device is sent the
result, ``bytes per weight`` of each module that changed, and holds nothing else. The bits are
those of the host's kernels, which are everyone's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hiedit.backbone.modules import EditableModule


@dataclass(frozen=True)
class HostModule(EditableModule):
    """A linear layer whose ``stored`` is a copy of its weight in host memory, made at first use."""

    copies: list[Tensor] = field(default_factory=list, compare=False, repr=False)

    @property
    def stored(self) -> Tensor:
        if not self.copies:
            weight = self.module.weight.data
            pinned = weight.is_cuda
            copy = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=pinned)
            self.copies.append(copy.copy_(weight))
        return self.copies[0]

    def store(self, weight: Tensor) -> None:
        self.module.weight.data.copy_(weight)

    def written(self) -> None:
        self.store(self.stored)


def on_host(module: EditableModule) -> HostModule:
    """``module`` with its edits kept in host memory."""
    return HostModule(
        module.name, module.module, module.in_features, module.out_features, module.conv1d
    )
