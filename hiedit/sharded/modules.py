"""Editable modules whose weight is spread over the ranks, each holding one flat range of it.

ZeRO-3 keeps rank ``k`` the elements ``[k p, (k + 1) p)`` of the row-major weight, ``p`` the number
of elements over that of ranks, rounded up; what lies beyond the weight's end is padding, which no
commit touches and no save writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hiedit.backbone.modules import EditableModule
from hiedit.sharded.ranks import Ranks


@dataclass(frozen=True)
class ShardedModule(EditableModule):
    """A linear layer whose weight is a ZeRO-3 parameter; ``stored`` is this rank's part, 1-d."""

    ranks: Ranks | None = None

    @property
    def span(self) -> tuple[int, int]:
        return span(self.weight)

    @property
    def stored(self) -> Tensor:
        release(self.weight)
        start, end = self.span
        return self.weight.ds_tensor.data[: end - start]

    def store(self, weight: Tensor) -> None:
        release(self.weight)
        self.weight.ds_tensor.data[: weight.numel()].copy_(weight)

    def held(self) -> Tensor:
        return self.stored.clone()

    def part(self, whole: Tensor) -> Tensor:
        start, end = self.span
        return whole.reshape(-1)[start:end]

    def whole(self, part: Tensor) -> Tensor:
        i, o = self.shape
        padded = part.new_zeros(self.weight.ds_tensor.numel())
        padded[: part.numel()] = part
        flat = self.ranks.gather(padded)[: i * o]
        return flat.view(i, o) if self.conv1d else flat.view(o, i)

    def largest(self, value: float) -> float:
        return self.ranks.largest(value)

    def total(self, value: float) -> float:
        return self.ranks.total(value)


def span(param) -> tuple[int, int]:
    """The flat range of a ZeRO-3 parameter that this rank holds; empty where it is all padding."""
    size = param.ds_tensor.ds_numel
    start = min(param.ds_zero_partition_rank * size, param.ds_numel)
    return start, min(start + size, param.ds_numel)


def release(param) -> None:
    """Give up a gathered copy, which would hide what is written to the shards."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if param.ds_status == ZeroParamStatus.INFLIGHT:
        raise RuntimeError(f"{param.ds_summary()} is being gathered: prefetching must be off")
    if param.ds_status == ZeroParamStatus.AVAILABLE:
        param.ds_active_sub_modules.clear()
        param.partition()


def sharded_modules(
    modules: Mapping[str, EditableModule], ranks: Ranks
) -> dict[str, ShardedModule]:
    """The same modules of a model that ZeRO-3 has partitioned."""
    return {
        name: ShardedModule(m.name, m.module, m.in_features, m.out_features, m.conv1d, ranks=ranks)
        for name, m in modules.items()
    }


def dtype_of(modules: Mapping[str, EditableModule]) -> torch.dtype:
    return next(iter(modules.values())).weight.dtype
