"""Means over the sequences of one edit, at the last token of its subject.

ROME (Meng et al. 2022, eq. 3) and MEMIT write one value at one key, the mean over several contexts:
what contexts do not share is left out of it. Shapes: ``T`` edit tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

LATER = 0.5  # of the share that is averaged once the passes that average in full are done


def share_at(share: float, used: int, full: int | None) -> float:
    """The share after ``used`` passes of an edit, of which the first ``full`` have all of it (None:
    every one): what contexts share is written first, then what each of them lacks."""
    return share if full is None or used < full else LATER * share


def averaged(rows: Tensor, edit: Tensor, subject: Tensor | None, share: float = 1.0) -> Tensor:
    """``rows`` [M, T, D], moved by ``share`` of the way to their mean over the subject's tokens of
    the same edit; other tokens as they are.

    edit: int64 [T]. subject: bool [T], None where there is no subject's token.
    """
    if subject is None or not share or not bool(subject.any()):
        return rows
    edits = int(edit.max()) + 1
    total = rows.new_zeros(len(rows), edits, rows.shape[-1])
    total = total.index_add(1, edit[subject], rows[:, subject])
    count = torch.bincount(edit[subject], minlength=edits).clamp(min=1)
    mean = (total / count[:, None])[:, edit]
    return torch.where(subject[:, None], rows.lerp(mean, share), rows)
