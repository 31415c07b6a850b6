"""The inside of the learner's actor: a plain class, made remote by the trainer, that turns
packed arrays into calls of ``hiedit.rl.learner`` and back. It needs no model, and loads none."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hiedit.config import MethodConfig, TrainConfig
from hiedit.distributed.transport import (
    Packed,
    pack,
    pack_snapshot,
    unpack,
    unpack_contribution,
    unpack_snapshot,
)
from hiedit.methods import CONTEXTS
from hiedit.policy.selectors import Selector
from hiedit.rl.learner import Learner
from hiedit.rl.sequences import from_tensor
from hiedit.runconfig import ModelConfig
from hiedit.updaters.updater import Updater


@dataclass(frozen=True)
class Setup:
    """Everything that an actor is made from.

    names, groups: the editable modules, and the same by (I, O). train: with the edits of this
    worker alone. threads: of torch. gradient_dtype: in which gradients travel.
    """

    model: ModelConfig
    method: MethodConfig
    train: TrainConfig
    names: list[str]
    groups: Mapping[tuple[int, int], list[str]]
    seed: int
    threads: int = 1
    gradient_dtype: str = "float32"


@dataclass(frozen=True)
class Update:
    """A learner's step as the controller reads it: the number of the version, whether it is a
    new one, losses and gradients dropped so far, bytes of the version, seconds spent."""

    version: int
    stepped: bool
    dropped: int
    bytes: int
    seconds: float


def build_parts(setup: Setup, parts: Packed) -> tuple[Selector, Updater]:
    """The selector and updater of ``setup`` with the contents of ``parts`` (their state dicts)."""
    torch.set_num_threads(setup.threads)
    selector = Selector(setup.names, setup.groups, setup.method.selector, setup.seed)
    updater = Updater(setup.names, setup.groups, setup.method.updater)
    tensors = unpack(parts)
    for prefix, part in (("selector.", selector), ("updater.", updater)):
        part.load_state_dict(
            {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
        )
    updater.reset()
    return selector, updater


def contexts_in(parts: Packed) -> tuple[str, ...]:
    """Return the texts before which the method whose ``editor_tensors`` these are edits."""
    found = unpack(parts, copy=False).get(CONTEXTS)
    return () if found is None else from_tensor(found)


class LearnerActor:
    """The learner of all workers; every version that it makes leaves it as a return value, which
    the object store keeps once and every node fetches once."""

    def __init__(self, setup: Setup, parts: Packed, device: str):
        selector, updater = build_parts(setup, parts)
        train = setup.train
        self.learner = Learner(
            selector.to(device), updater.to(device), train.clip, train.steps_per_update
        )

    def load(self, state: Packed) -> None:
        """Go on from what ``state`` gave."""
        self.learner.load_state(unpack_snapshot(state))

    def publish(self) -> Packed:
        """The version as it stands."""
        return pack(self.learner.published(), {"version": self.learner.version})

    def update(self, *contributions: Packed) -> tuple[Update, Packed]:
        """One step on ``contributions`` in the order given, and the version it makes."""
        began = time.perf_counter()
        stepped = self.learner.update([unpack_contribution(c) for c in contributions])
        packed = self.publish()
        version, dropped = self.learner.version, self.learner.dropped
        spent = time.perf_counter() - began
        return Update(version, stepped, dropped, packed.bytes, spent), packed

    def state(self) -> Packed:
        """All that it takes to go on, Adam's moments included."""
        return pack_snapshot(self.learner.state())
