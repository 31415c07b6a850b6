"""Trajectory training in one process: lifelong streams that grow, a learner that steps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from hiedit.config import TrainConfig
from hiedit.rl.checkpoint import LEARNER, Checkpoints, StopSignals, stopped, worker_name
from hiedit.rl.learner import Learner
from hiedit.rl.objective import Objective
from hiedit.rl.rollout import Rollout
from hiedit.rl.segment import TrainStep, Trajectory, growing_streams, train_edit
from hiedit.types import EditBatch, EditRequest

__all__ = ["Trainer", "TrainStep", "growing_streams"]


class Trainer:
    """Runs training edits through a rollout and hands their gradients to a learner."""

    def __init__(self, rollout: Rollout, objective: Objective, learner: Learner):
        self.rollout, self.objective, self.learner = rollout, objective, learner

    def agree(self, number: int) -> int:
        """Return what every process of this training goes by: the largest of their numbers."""
        return number

    def run(
        self,
        requests: tuple[EditRequest, ...],
        config: TrainConfig,
        seed: int,
        on_step: Callable[[TrainStep], None] = lambda step: None,
        checkpoints: Checkpoints | None = None,
    ) -> list[TrainStep]:
        """Train on ``config.edits`` edits; leaves the model unedited, also on an error.

        checkpoints: where the state is written, and read from if it is to resume.

        Raises:
            Interrupted: after SIGINT or SIGTERM, if there are ``checkpoints``; one was written.
        """
        trajectory = Trajectory(self.rollout, self.objective, requests, config, seed)
        try:
            if checkpoints is None:
                return self._run(trajectory, config, [], on_step, None, None)
            history = self._resume(trajectory, checkpoints)
            with StopSignals() as stop:
                return self._run(trajectory, config, history, on_step, checkpoints, stop)
        finally:
            self.rollout.reset()
            self.rollout.env.backbone.prefix.cache.clear()  # what follows starts as if it resumed

    def _run(self, trajectory, config, history, on_step, checkpoints, stop) -> list[TrainStep]:
        """Segment after segment until the streams, the time, or the user's patience end."""
        start = time.perf_counter() - (history[-1].seconds if history else 0.0)
        late = False

        def tell(step: TrainStep) -> bool:
            nonlocal late
            self.learner.edit_done()
            history.append(step)
            on_step(step)
            late = bool(config.max_seconds) and step.seconds > config.max_seconds
            late = bool(self.agree(late)) if config.max_seconds else False
            return late

        while not late:
            done = trajectory.run(self.learner.every, self.learner.backward, tell, start)
            ended = late or len(done) < self.learner.every
            if checkpoints is None:
                if ended:
                    break
                continue
            number = self.agree(stop.number or 0)
            stopping = bool(number) and not ended
            if ended or stopping or checkpoints.due(self.learner.version):
                path = self._save(trajectory, history, checkpoints)
            if stopping:
                raise stopped(number, path)
            if ended:
                break
        return history

    def edit(self, batch: EditBatch, stream: int = 0, start: float = 0.0) -> TrainStep:
        """One training edit, of whatever stream, and the learner is told."""
        backward = self.learner.backward
        step = train_edit(self.rollout, self.objective, backward, batch, stream, start)
        self.learner.edit_done()
        return step

    def _save(self, trajectory: Trajectory, history: list[TrainStep], checkpoints: Checkpoints):
        parts = {LEARNER: self.learner.state(), worker_name(0): trajectory.state()}
        steps = [dataclasses.asdict(step) for step in history]
        return checkpoints.save(history[-1].edit if history else 0, parts, {"history": steps})

    def _resume(self, trajectory: Trajectory, checkpoints: Checkpoints) -> list[TrainStep]:
        found = checkpoints.load()
        if found is None:
            return []
        parts, about = found
        self.learner.load_state(parts[LEARNER])
        trajectory.load_state(parts[worker_name(0)])
        return [TrainStep(**step) for step in about["history"]]
