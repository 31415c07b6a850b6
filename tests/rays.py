"""What the tests of distributed training share: a method small enough, two workers' numbers without
Ray, and workers that fail on order."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import time
from pathlib import Path

from worlds import MODULES, quick

from hiedit.config import TrainConfig
from hiedit.distributed.trainer import SEED_STEP, share
from hiedit.distributed.transport import unpack
from hiedit.distributed.worker import RolloutWorker
from hiedit.rl.checkpoint import Snapshot
from hiedit.rl.learner import Contribution, Gradients
from hiedit.rl.objective import Objective
from hiedit.rl.observed import learned_state, load_learned_state, recorded
from hiedit.rl.segment import Trajectory
from hiedit.runconfig import DistributionConfig, ModelConfig

MODEL = ModelConfig(modules=MODULES, dtype="float32", device="cpu")
TRAIN = TrainConfig(edits=11, stream_lengths=[2, 4], steps_per_update=2)  # 6 and 5 of 2 workers
TWO = DistributionConfig("ray", workers=2, timeout=60.0)
SEED = 5


def timeless(history):
    return [dataclasses.replace(step, seconds=0.0) for step in history]


def learned(method):
    rollout = method.rollout
    return learned_state({"selector": rollout.selector, "updater": rollout.updater})


def trajectory(rollout, requests, index):
    """Worker ``index`` as it begins."""
    seed = SEED + index * SEED_STEP
    objective = Objective(quick("hiedit").objective, rollout.env.backbone.tokenizer, seed)
    return Trajectory(rollout, objective, requests, share(TRAIN, 2, index), seed)


def in_one_process(learner, trajectories):
    """The final version and the losses, round by round: workers one after the other, on one
    model, whose edits are put back from each one's state."""
    rollout = trajectories[0].rollout
    gradients = Gradients(rollout.selector, rollout.updater)
    states, losses = [one.state() for one in trajectories], []
    for _ in range(3):
        version, contributions = learner.published(), []
        for i, one in enumerate(trajectories):
            one.load_state(states[i])
            load_learned_state(gradients.modules, version)
            with recorded(gradients.modules) as observed:
                steps = one.run(TRAIN.steps_per_update, gradients.backward)
            taken, dropped = gradients.take()
            full = len(steps) == TRAIN.steps_per_update
            contributions.append(Contribution(taken if full else {}, observed, dropped))
            states[i] = one.state()
            losses += [step.loss for step in steps]
        learner.update(contributions)
    rollout.reset()
    return learner.published(), losses


def ordered_worker(directory: Path):
    """Rollout workers that do what they find in ``directory``: a file ``INDEX-SEGMENT`` says how
    to fail there, half-way through the segment, once (``always-...``: whenever one begins)."""

    class OrderedWorker(RolloutWorker):
        def segment(self, version, state=None):
            if state is not None:  # else it goes on where it is
                self.trajectory.load_state(Snapshot(unpack(state), state.values))
            index, number = self.setup.seed // 1_000_003, self.trajectory.position // 2
            path = directory / f"{index}-{number}"
            order = path.read_text() if path.exists() else ""
            if order and not order.startswith("always-"):
                path.unlink()
            run, gradients = self.trajectory.run, self.gradients

            def spoiled(steps, backward):
                done = run(1, backward)
                if order == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                if order in ("wait", "hang"):
                    (directory / f"waiting-{index}").touch()
                    time.sleep(1000)
                if order.startswith("slow"):
                    time.sleep(1.5)
                done += run(steps - 1, backward)
                if order.endswith("nan"):
                    next(iter(gradients.named().values())).grad.fill_(float("nan"))
                return done

            if order:
                self.trajectory.run = spoiled
            try:
                return super().segment(version)
            finally:
                self.trajectory.run = run

    return OrderedWorker


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
