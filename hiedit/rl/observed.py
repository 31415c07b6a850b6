"""Observations of a worker's running statistics, small enough to travel, and the same again
elsewhere.

``RunningNorm.observe`` takes all signals of a pass; what it makes of them depends on their number,
mean and spread alone. A worker records these, and the learner adds them to its own statistics in
an order of its choice: with one worker, to the bit what the worker has.

Shapes: ``M`` modules of one shape, ``T`` edit tokens, ``D`` features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hiedit.backbone.normalise import RunningNorm
from hiedit.updaters.memory import statistics


@dataclass(frozen=True)
class Observed:
    """One call of ``RunningNorm.add``.

    norm: its name, see ``running_norms``. tokens: T. mean: [M, D]. spread: [M, D], the sum of
    squared distances from the mean.
    """

    norm: str
    tokens: int
    mean: Tensor
    spread: Tensor


def running_norms(parts: Mapping[str, nn.Module]) -> dict[str, RunningNorm]:
    """All running statistics inside ``parts``, by ``part.place``."""
    return {
        f"{part}.{place}": module
        for part, root in parts.items()
        for place, module in root.named_modules()
        if isinstance(module, RunningNorm)
    }


def learned_state(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Copies of all parameters and running statistics of ``parts``: what a version consists of."""
    state = {}
    for part, root in parts.items():
        state |= {f"{part}.{n}": p.detach().clone() for n, p in root.named_parameters()}
        state |= {f"{part}.{n}": b for n, b in statistics(root).items()}
    return state


@torch.no_grad()
def load_learned_state(parts: Mapping[str, nn.Module], state: Mapping[str, Tensor]) -> None:
    """Put back what ``learned_state`` gave.

    Raises:
        ValueError: for a name or a shape that ``parts`` do not have; nothing was changed.
    """
    own = {}
    for part, root in parts.items():
        own |= {f"{part}.{n}": v for n, v in (*root.named_parameters(), *root.named_buffers())}
    for name, value in state.items():
        if name not in own or own[name].shape != value.shape:
            has = tuple(own[name].shape) if name in own else "no such tensor"
            raise ValueError(f"{name} {tuple(value.shape)} does not fit this method: it has {has}")
    for name, value in state.items():
        own[name].copy_(value)


@contextlib.contextmanager
def recorded(parts: Mapping[str, nn.Module]) -> Iterator[list[Observed]]:
    """Append every observation of ``parts`` in the block to what this yields, in order."""
    seen: list[Observed] = []
    norms = running_norms(parts)

    def recording(name: str, norm: RunningNorm):
        def add(tokens: int, mean: Tensor, spread: Tensor) -> None:
            seen.append(Observed(name, tokens, mean, spread))
            RunningNorm.add(norm, tokens, mean, spread)

        return add

    for name, norm in norms.items():
        norm.add = recording(name, norm)  # the instance's own, until it is removed again
    try:
        yield seen
    finally:
        for norm in norms.values():
            vars(norm).pop("add", None)


def replay(parts: Mapping[str, nn.Module], seen: Sequence[Observed]) -> None:
    """Add observations to the statistics of ``parts``, in order."""
    norms = running_norms(parts)
    for summary in seen:
        norm = norms[summary.norm]
        device = norm.mean.device
        norm.add(summary.tokens, summary.mean.to(device), summary.spread.to(device))
