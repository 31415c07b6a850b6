"""The inside of a rollout worker's actor: a plain class, made remote by the pool, that turns
packed arrays into segments of a trajectory and back."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from hiedit.distributed.learner import Setup, build_parts, contexts_in
from hiedit.distributed.transport import (
    Packed,
    pack_contribution,
    pack_snapshot,
    unpack,
    unpack_snapshot,
)
from hiedit.experiment import load_backbone
from hiedit.rl.environment import Environment
from hiedit.rl.learner import Contribution, Gradients
from hiedit.rl.objective import Objective
from hiedit.rl.observed import load_learned_state, recorded
from hiedit.rl.rollout import Rollout
from hiedit.rl.segment import TrainStep, Trajectory
from hiedit.types import EditRequest


@dataclass(frozen=True)
class Report:
    """A segment as the controller reads it; the tensors pass it by.

    steps: of its edits, as the worker counts them. before: the worker's edits before it. full: as
    many steps as a version takes; otherwise the worker's streams have ended. finite: its
    gradients are. bytes: of the gradients and observations. state: bytes of the state, which stays
    on the worker's node unless it is asked for. seconds: spent computing, of which ``cpu`` on a
    core. packing: seconds spent making arrays of gradients and state.
    """

    steps: tuple[TrainStep, ...]
    before: int
    full: bool
    finite: bool
    bytes: int
    state: int
    seconds: float
    cpu: float
    packing: float


class RolloutWorker:
    """A replica of the model and a lifelong trajectory on it."""

    def __init__(self, setup: Setup, parts: Packed, requests: tuple[EditRequest, ...]):
        selector, updater = build_parts(setup, parts)
        backbone = load_backbone(setup.model)
        selector, updater = selector.to(backbone.device), updater.to(backbone.device)
        env, passes = Environment(backbone), setup.method.passes
        rollout = Rollout(env, selector, updater, passes, contexts=contexts_in(parts))
        objective = Objective(setup.method.objective, backbone.tokenizer, setup.seed)
        self.setup, self.gradients = setup, Gradients(selector, updater)
        self.trajectory = Trajectory(rollout, objective, requests, setup.train, setup.seed)

    def ready(self) -> int:
        """The process, once the replica is loaded."""
        return os.getpid()

    def segment(
        self, version: Packed, state: Packed | None = None
    ) -> tuple[Report, Packed, Packed]:
        """(report, contribution, state at its end) of the next segment under ``version``; with
        ``state``, of the segment that begins there."""
        began, cpu = time.perf_counter(), time.process_time()
        if state is not None:
            self.trajectory.load_state(unpack_snapshot(state))
        load_learned_state(self.gradients.modules, unpack(version, copy=False))
        every, before = self.setup.train.steps_per_update, self.trajectory.edits
        with recorded(self.gradients.modules) as observed:
            steps = self.trajectory.run(every, self.gradients.backward)
        gradients, dropped = self.gradients.take()
        full = len(steps) == every
        finite = all(bool(g.isfinite().all()) for g in gradients.values())
        spent, cpu = time.perf_counter() - began, time.process_time() - cpu
        given = Contribution(gradients if full else {}, observed, dropped)
        packed = pack_contribution(given, self.setup.gradient_dtype)
        end = self.state()
        packing = time.perf_counter() - began - spent
        sizes = packed.bytes, end.bytes
        return Report(tuple(steps), before, full, finite, *sizes, spent, cpu, packing), packed, end

    def state(self) -> Packed:
        """Return where the trajectory stands; Ray copies it to its store before the next call."""
        return pack_snapshot(self.trajectory.state(copy=False))
