"""The unit of the ledger's arithmetic, which every backend takes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Update:
    """The work of a commit on one module.

    acc: fp32, contiguous: the whole weight ([O, I], or [I, O] for a Conv1D), or exactly the
        elements of a flat range, as a ZeRO shard holds them.
    A: [r, I], B: [O, r], scale: [r] or None for all ones; fp32, or bf16 or fp16 (widened exactly).
        None where nothing is accumulated.
    weight, base: W and W_0, of one dtype, each like acc; None where nothing is rounded.
    """

    acc: Tensor
    A: Tensor | None = None
    B: Tensor | None = None
    scale: Tensor | None = None
    weight: Tensor | None = None
    base: Tensor | None = None
