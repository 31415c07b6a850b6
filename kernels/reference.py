"""What ``shift.shifted`` computes, in plain PyTorch. (The commit's reference is
``hiedit/ledger/accumulate.py``.)

Shape letters: ``T`` tokens, ``N`` sequences, ``I``/``O`` in and out features, ``r`` rank rows.
"""

from __future__ import annotations

from torch import Tensor


def shifted(
    out: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Tensor | None, rows: Tensor | None
) -> Tensor:
    """``out + ((x A^T) * scale) B^T``; see ``shift.shifted`` for the arguments."""
    h = x @ A.T
    if scale is not None:
        h = h * (scale if scale.dim() == 1 else scale[rows].view(*x.shape[:-1], -1))
    return out + h @ B.T
