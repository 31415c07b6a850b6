"""The table of addresses that one launch of a commit reads, for Triton and for CUDA alike.

Free of Triton, so that the CUDA kernel needs none. ``csrc/commit.h`` repeats the columns.

Shape letters: ``L`` modules, ``R``/``C`` rows and columns of the weight as stored, ``r`` rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hiedit.ledger.update import Update

# Columns of the table. Addresses are those of flat position 0; of a shard they may lie before its
# storage. left [R, r] and right [r, C] are the factors as the stored weight sees them: B and A, or
# for Conv1D the transposes of A and B. Address 0: no scale. Strides in elements.
FIELDS = ("acc", "weight", "base", "left", "right", "scale", "rank",
          "left_row", "left_rank", "right_rank", "right_column", "scale_rank")  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Table:
    """The modules of one launch.

    entries: int64 [L, len(FIELDS)], on the host.
    weight, factor: name of the dtype of the weights and of the factors, None where there are none.
    rank: the largest. aligned: addresses and row strides allow 16 bytes at a time. unit: the right
        factor's columns are neighbours in memory.
    updates: what the addresses point into; keeps copies alive that were made for this launch.
    """

    entries: Tensor
    weight: str | None
    factor: str | None
    rank: int
    aligned: bool
    unit: bool
    updates: Sequence[Update]

    @staticmethod
    def of(updates: Sequence[Update], start: int, end: int, conv1d: bool) -> Table:
        """For an update of the flat range [start, end) of every weight."""
        updates = _one_factor_dtype(updates)
        rows = [_entry(update, start, end, conv1d) for update in updates]
        first = updates[0]
        return Table(
            torch.tensor([[row[field] for field in FIELDS] for row in rows]),
            None if first.weight is None else _NAMES[first.weight.dtype],
            None if first.A is None else _NAMES[first.A.dtype],
            max(row["rank"] for row in rows),
            all(_aligned(row) for row in rows),
            all(row["right_column"] == 1 for row in rows),
            updates,
        )

    def on(self, device: torch.device) -> Tensor:
        """The entries on ``device``, without waiting for it."""
        if device.type != "cuda":
            return self.entries
        return self.entries.pin_memory().to(device, non_blocking=True)


def _one_factor_dtype(updates: Sequence[Update]) -> list[Update]:
    """Factors as they are where all have one dtype, else widened to fp32, which is exact."""
    found = {t.dtype for update in updates for t in (update.A, update.B) if t is not None}
    wide = torch.float32 if len(found) > 1 else None

    def widened(t: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
        return t if t is None or dtype is None else t.to(dtype)

    return [
        dataclasses.replace(
            update,
            A=widened(update.A, wide),
            B=widened(update.B, wide),
            scale=widened(update.scale, torch.float32),
        )
        for update in updates
    ]


def _entry(update: Update, start: int, end: int, conv1d: bool) -> dict[str, int]:
    """One row of the table by column."""

    def address(t: Tensor | None) -> int:
        if t is None:
            return 0
        shard = t.numel() == end - start
        return t.data_ptr() - (start * t.element_size() if shard else 0)

    entry = dict.fromkeys(FIELDS, 0)
    entry |= {name: address(getattr(update, name)) for name in ("acc", "weight", "base")}
    if update.A is None:
        return entry
    left, right = (update.A.T, update.B.T) if conv1d else (update.B, update.A)
    entry |= {"left": left.data_ptr(), "right": right.data_ptr(), "rank": len(update.A)}
    entry["left_row"], entry["left_rank"] = left.stride()
    entry["right_rank"], entry["right_column"] = right.stride()
    if update.scale is not None and len(update.scale):
        entry |= {"scale": update.scale.data_ptr(), "scale_rank": update.scale.stride(0)}
    return entry


def _aligned(entry: dict[str, int]) -> bool:
    addresses = ("acc", "weight", "base", "right")
    return all(entry[name] % 16 == 0 for name in addresses) and entry["right_rank"] % 8 == 0
