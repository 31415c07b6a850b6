"""A whole run whose workers are groups of ranks, for models that no single process holds.

driver:       config, records -> pool of groups, learner -> Controller -> results.json, table
first group:  build the method   -> its part of the training -> finish the editor, edit, measure
other groups:                       their part of the training

The driver loads no weight. The groups stay for all methods of the run: a replica is loaded once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Sequence

from hiedit.config import MethodConfig
from hiedit.distributed import require_ray
from hiedit.distributed.session import session
from hiedit.distributed.trainer import learner_actor, setups_of, train_with
from hiedit.evaluation.lifelong import with_training
from hiedit.evaluation.results import MethodResult
from hiedit.experiment import load_data
from hiedit.methods import write_editor
from hiedit.progress import Update
from hiedit.rl.checkpoint import LEARNER
from hiedit.rl.learner import without_moments
from hiedit.rl.training import TrainStep
from hiedit.run import checkpoints_of, editor_place, hooks_of, learns, of_version, run
from hiedit.runconfig import RunConfig
from hiedit.sharded import require_deepspeed


def run_grouped(
    config: RunConfig, methods: Sequence[MethodConfig] = (), worker: type | None = None
) -> list[MethodResult]:
    """``hiedit.run.run`` with groups of ranks as workers; ``worker``: the class of the ranks, for
    whoever puts another in its place.

    Raises:
        ValueError: on a user's mistake.
        WorkerDied: if a group failed too often, or the learner died.
    """
    require_ray()
    require_deepspeed()
    with contextlib.closing(GroupedJob(worker)) as job:
        return run(config, methods, task=job)


class GroupedJob:
    """One method from start to end; the groups are kept for the next one. counts, history: of the
    last training, see ``Controller``."""

    def __init__(self, worker: type | None = None):
        self.worker, self.counts, self.history = worker, None, []
        self._pool, self._open = None, contextlib.ExitStack()

    def close(self) -> None:
        self._pool = None
        self._open.close()

    def __call__(
        self, config: RunConfig, method: MethodConfig, editor: None, send
    ) -> tuple[MethodResult, list[TrainStep]]:
        import ray

        name, start = method.name, time.perf_counter()
        send(Update(name, "load"))
        pool = self._started(config)
        send(Update(name, "prepare"))
        built = pool.build(method)
        history: list[TrainStep] = []
        parts = ray.put(built.parts)
        if learns(config, method):
            parts, history = self._trained(config, method, built, send)
        spent = time.perf_counter() - start
        send(Update(name, "edit"))
        result = pool.evaluate(
            method, parts, lambda done, total: send(Update(name, "edit", done, total))
        )
        send(Update(name, "done", 1, 1))
        return with_training(result, spent, history[-1].edit if history else 0), history

    def _started(self, config: RunConfig):
        from hiedit.distributed.groups import GroupPool
        from hiedit.distributed.rank import RankWorker

        if self._pool is None:
            data = load_data(config.dataset, config.stream, config.seed)
            self._open.enter_context(session(config.distribution))
            pool = GroupPool(config, data, self.worker or RankWorker)
            self._open.callback(pool.stop)
            pool.start()
            self._pool = pool
        return self._pool

    def _trained(self, config: RunConfig, method: MethodConfig, built, send):
        """(reference to the trained editor's tensors, history); the editor is saved."""
        import ray

        from hiedit.distributed.controller import Controller
        from hiedit.distributed.transport import pack, unpack

        name, pool, d = method.name, self._pool, config.distribution
        checkpoints = checkpoints_of(config, method)
        found = checkpoints.load() if checkpoints is not None else None
        tensors = unpack(built.parts, copy=False)
        if found is not None:
            tensors = tensors | without_moments(found[0][LEARNER])
        parts, requests = ray.put(pack(tensors)), ray.put(built.requests)
        model = dataclasses.replace(config.model, modules=built.names)
        setups = setups_of(model, method, d, config.train, config.seed, built.names, built.groups)
        hooks = hooks_of(config, name, send, lambda: controller.status())
        with learner_actor(d, setups[0], config.train, parts) as learner:
            pool.train(setups, parts, requests)
            controller = Controller(
                d,
                pool,
                learner,
                functools.partial(hooks.train, total=config.train.edits),
                checkpoints,
                lambda steps: send(of_version(name, steps, controller.status())),
            )
            self.counts = controller.counts
            hooks.stage("train")
            version = ray.put(train_with(controller, learner, found, config.train.max_seconds))
        self.history = controller.history
        editor = pool.finish(method, parts, version, requests)
        write_editor(editor_place(config, name), method, built.names, unpack(editor))
        return ray.put(editor), self.history
