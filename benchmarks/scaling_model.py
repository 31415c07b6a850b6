"""How training scales to more workers than there are here: a formula, its inputs, and a table.

W workers, s edits per update, t seconds per edit, G bytes of gradients and V of a version, S of
a worker's state, B bytes/s of the learner's network, N = W / workers per node nodes

segment = s t                                     the mean worker's editing
wait    = s t z(W) c / sqrt(s)                    sync: the slowest of W (c: variation of an edit)
pack    = (G + S) / copy                          arrays in the node's store; S stays there
up      = W G / B                                 every gradient arrives at the learner
learn   = W G / add + V / step                    sums, clips, Adam, a copy
down    = N V / B                                 once per node

sync:   edits/s = W s / (segment + wait + pack + up + learn + down)
        at most   s / (G / B + G / add + V / (B * workers per node)), whatever W and t
async:  edits/s = the smaller of W s / (segment + pack + G/B + V/B) and s / max(G/B, V/B, learn)
        with W = 1 in `learn`: one contribution is a version of its own, and every worker that
        begins again fetches it; the others' W - 1 contributions come in between, so that
        ``max_staleness`` must be about W, or what is stale is dropped
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

WORKERS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Inputs:
    """edit: seconds per edit on one worker. variation: of that, standard deviation over mean.
    gradients, version, state: bytes. network, copy, add, step: bytes per second of the learner's
    network, of making arrays in the store, of adding a gradient, of a step of Adam. per_node:
    workers of one node."""

    edit: float
    variation: float
    gradients: float
    version: float
    state: float
    network: float
    copy: float
    add: float
    step: float
    per_node: int = 8


@dataclass(frozen=True)
class Option:
    """steps: edits per update. halved: gradients as bfloat16. asynchronous: no waiting. gpu: the
    learner's."""

    name: str
    steps: int = 1
    halved: bool = False
    asynchronous: bool = False
    gpu: bool = False


OPTIONS = (
    Option("1 edit per update"),
    Option("10 edits per update", 10),
    Option("10, bfloat16", 10, halved=True),
    Option("100 edits per update", 100),
    Option("10, asynchronous", 10, asynchronous=True),
    Option("10, learner on a GPU", 10, gpu=True),
    Option("10, GPU and bfloat16", 10, halved=True, gpu=True),
    Option("10, GPU and async", 10, asynchronous=True, gpu=True),
    Option("10, all three", 10, halved=True, asynchronous=True, gpu=True),
)
GPU_ADD, GPU_STEP = 20e9, 200e9


def slowest(workers: int) -> float:
    """Expected maximum of ``workers`` standard normal values (Blom's approximation)."""
    return NormalDist().inv_cdf((workers - 0.375) / (workers + 0.25)) if workers > 1 else 0.0


def edits_per_second(workers: int, option: Option, given: Inputs) -> float:
    """What the formula above says."""
    i, s = _with(option, given), option.steps
    segment, pack = s * i.edit, (i.gradients + i.state) / i.copy
    up, add = i.gradients / i.network, i.gradients / i.add
    if option.asynchronous:
        down = i.version / i.network
        fed = s / max(up, down, add + i.version / i.step)
        return min(workers * s / (segment + pack + up + down), fed)
    wait = math.sqrt(s) * i.edit * i.variation * slowest(workers)
    learn = workers * add + i.version / i.step
    down = math.ceil(workers / i.per_node) * i.version / i.network
    return workers * s / (segment + wait + pack + workers * up + learn + down)


def ceiling(option: Option, given: Inputs) -> float:
    """What no number of workers exceeds."""
    i, s = _with(option, given), option.steps
    up, add = i.gradients / i.network, i.gradients / i.add
    if option.asynchronous:
        return s / max(up, i.version / i.network, add + i.version / i.step)
    return s / (up + add + i.version / i.network / i.per_node)


def half_way(option: Option, given: Inputs) -> int:
    """The number of workers at which half of ``ceiling`` is reached."""
    low = 1
    while edits_per_second(low, option, given) < ceiling(option, given) / 2 and low < 1 << 20:
        low += 1
    return low


def _with(option: Option, given: Inputs) -> Inputs:
    if option.gpu:
        given = replace(given, add=GPU_ADD, step=GPU_STEP)
    return replace(given, gradients=given.gradients / 2) if option.halved else given


def rows(given: Inputs, workers: Sequence[int] = WORKERS) -> list[list[str]]:
    """Per option: edits per second at every number of workers, the ceiling, half of it."""
    return [
        [
            option.name,
            *(f"{edits_per_second(w, option, given):.1f}" for w in workers),
            f"{ceiling(option, given):.0f}",
            str(half_way(option, given)),
        ]
        for option in OPTIONS
    ]
