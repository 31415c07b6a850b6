"""Training on Ray behind the interface of ``rl.training.Trainer``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hiedit.config import MethodConfig, TrainConfig
from hiedit.distributed import require_ray
from hiedit.distributed.session import session
from hiedit.methods import Method, editor_tensors
from hiedit.rl.checkpoint import LEARNER, Checkpoints
from hiedit.rl.learner import without_moments
from hiedit.rl.observed import load_learned_state
from hiedit.rl.training import TrainStep
from hiedit.runconfig import DistributionConfig, ModelConfig
from hiedit.types import EditRequest

SEED_STEP = 1_000_003  # between the seeds of two workers; that of the first is the run's own


def share(config: TrainConfig, workers: int, index: int) -> TrainConfig:
    """``config`` with the part of the edits that worker ``index`` runs."""
    edits = config.edits // workers + (index < config.edits % workers)
    return dataclasses.replace(config, edits=edits)


def setups_of(
    model: ModelConfig,
    method: MethodConfig,
    config: DistributionConfig,
    train: TrainConfig,
    seed: int,
    names: list[str],
    groups: Mapping[tuple[int, int], list[str]],
) -> list:
    """Return what each worker is made from (``Setup``), with its share of the edits and a seed."""
    from hiedit.distributed.learner import Setup

    return [
        Setup(
            model,
            method,
            share(train, config.workers, i),
            names,
            groups,
            seed + i * SEED_STEP,
            config.threads,
            config.gradient_dtype,
        )
        for i in range(config.workers)
    ]


@contextlib.contextmanager
def learner_actor(config: DistributionConfig, setup, train: TrainConfig, parts) -> Iterator[Any]:
    """A learner for all workers, ended on leaving; ``parts`` refers to what it begins with."""
    import ray

    from hiedit.distributed.learner import LearnerActor

    make = ray.remote(num_cpus=0, num_gpus=config.learner_gpus)(LearnerActor)
    device = "cuda" if config.learner_gpus else "cpu"
    learner = make.remote(dataclasses.replace(setup, train=train), parts, device)
    try:
        yield learner
    finally:
        ray.kill(learner, no_restart=True)


def train_with(controller, learner, found, max_seconds: float):
    """Run ``controller`` to its end, from the checkpoint ``found`` if there is one; returns the
    last version, packed."""
    import ray

    from hiedit.distributed.transport import pack_snapshot

    if found is not None:
        ray.get(learner.load.remote(pack_snapshot(found[0][LEARNER])))
        controller.load(*found)
    return controller.run(max_seconds)


class RayTrainer:
    """Trains ``method`` with rollout workers and a learner on Ray.

    counts: what happened (see ``Controller``), while it runs and afterwards. on_version: is given
    the edits of every version, once it is there. worker: the class of the workers, for whoever puts
    another in its place.
    """

    def __init__(
        self,
        method: Method,
        model: ModelConfig,
        config: DistributionConfig,
        on_version: Callable[[list[TrainStep]], None] = lambda steps: None,
        worker: type | None = None,
    ):
        require_ray()
        self.method, self.model, self.config = method, model, config
        self.on_version, self.worker = on_version, worker
        self.controller = None

    @property
    def counts(self):
        return self.controller.counts if self.controller else None

    def status(self) -> dict[str, float]:
        """Return what changes while it runs, for the display and the tracker."""
        return self.controller.status() if self.controller else {}

    def run(
        self,
        requests: tuple[EditRequest, ...],
        config: TrainConfig,
        seed: int,
        on_step: Callable[[TrainStep], None] = lambda step: None,
        checkpoints: Checkpoints | None = None,
    ) -> list[TrainStep]:
        """Do as ``Trainer.run``, ``config.edits`` edits in all; ``method`` ends as the learner's.

        Raises:
            Interrupted: after SIGINT or SIGTERM; with ``checkpoints``, one was written.
            WorkerDied: if a worker failed too often (a checkpoint was written) or the learner
                died.
        """
        if not requests:
            raise ValueError("train: there are no training edits; give training records")
        with session(self.config):
            version = self._train(requests, config, seed, on_step, checkpoints)
            load_learned_state(self._modules(), version)
        self.method.rollout.reset()
        self.method.rollout.env.backbone.prefix.cache.clear()  # as after training in one process
        return self.controller.history

    def _train(self, requests, config, seed, on_step, checkpoints):
        import ray

        from hiedit.distributed.controller import Controller
        from hiedit.distributed.pool import WorkerPool
        from hiedit.distributed.transport import unpack
        from hiedit.distributed.worker import RolloutWorker

        found = checkpoints.load() if checkpoints is not None else None
        setups = self.setups(config, seed)
        if found is not None:
            load_learned_state(self._modules(), without_moments(found[0][LEARNER]))
        parts = ray.put(self.parts())
        with learner_actor(self.config, setups[0], config, parts) as learner:
            worker = self.worker or RolloutWorker
            pool = WorkerPool(self.config, setups, parts, ray.put(requests), worker)
            try:
                pool.start()
                self.controller = Controller(
                    self.config, pool, learner, on_step, checkpoints, self.on_version
                )
                return unpack(train_with(self.controller, learner, found, config.max_seconds))
            finally:
                pool.stop()

    def setups(self, config: TrainConfig, seed: int):
        """Return what each worker is made from; the first one has the run's own seed."""
        backbone = self.method.rollout.env.backbone
        names, groups = backbone.names, backbone.shape_groups()
        device = self.model.device
        if device == "auto":
            device = "cuda" if self.config.num_gpus else "cpu"
        model = dataclasses.replace(self.model, modules=names, device=device)
        return setups_of(model, self.method.config, self.config, config, seed, names, groups)

    def _modules(self):
        rollout = self.method.rollout
        return {"selector": rollout.selector, "updater": rollout.updater}

    def parts(self):
        """The ``editor_tensors``, as ``build_method`` left them."""
        from hiedit.distributed.transport import pack

        return pack(editor_tensors(self.method))
