"""Tensors as NumPy arrays, which Ray's object store shares between processes without a copy."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hiedit.rl.checkpoint import Snapshot
from hiedit.rl.learner import Contribution
from hiedit.rl.observed import Observed


@dataclass(frozen=True)
class Packed:
    """Tensors on their way. arrays: by name; bfloat16 as its bits, named in ``half``. values:
    numbers and words that belong to them."""

    arrays: Mapping[str, np.ndarray]
    half: frozenset[str] = frozenset()
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


def pack(tensors: Mapping[str, Tensor], values: Mapping[str, Any] | None = None) -> Packed:
    """Pack tensors of any device; one on the CPU is not copied here."""
    arrays, half = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            half.add(name)
            tensor = tensor.view(torch.int16)
        arrays[name] = tensor.numpy()
    return Packed(arrays, frozenset(half), dict(values or {}))


def unpack(packed: Packed, copy: bool = True) -> dict[str, Tensor]:
    """Tensors by name; without ``copy`` they may stand in shared memory, to be read only."""
    tensors = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for name, array in packed.arrays.items():
            tensor = torch.from_numpy(np.array(array) if copy else array)
            tensors[name] = tensor.view(torch.bfloat16) if name in packed.half else tensor
    return tensors


def pack_snapshot(snapshot: Snapshot) -> Packed:
    return pack(snapshot.tensors, snapshot.values)


def unpack_snapshot(packed: Packed) -> Snapshot:
    return Snapshot(unpack(packed), packed.values)


def pack_contribution(contribution: Contribution, dtype: str = "float32") -> Packed:
    """Gradients travel as ``dtype``: bfloat16 is half the bytes, of which eight bits count."""
    kind = getattr(torch, dtype)
    tensors = {f"gradient.{n}": g.to(kind) for n, g in contribution.gradients.items()}
    for i, seen in enumerate(contribution.observed):
        tensors |= {f"mean.{i}": seen.mean, f"spread.{i}": seen.spread}
    observed = [(seen.norm, seen.tokens) for seen in contribution.observed]
    return pack(tensors, {"observed": observed, "dropped": contribution.dropped})


def unpack_contribution(packed: Packed) -> Contribution:
    """The tensors are to be read only."""
    tensors = unpack(packed, copy=False)
    observed = [
        Observed(norm, tokens, tensors[f"mean.{i}"], tensors[f"spread.{i}"])
        for i, (norm, tokens) in enumerate(packed.values["observed"])
    ]
    begin = "gradient."
    gradients = {n[len(begin) :]: t.float() for n, t in tensors.items() if n.startswith(begin)}
    return Contribution(gradients, observed, packed.values["dropped"])
