"""A whole run over one sharded model, the same program on every rank.

rank 0:       run (progress, results.json, plots, MLflow)  --+
                                                              +-- method_on_ranks, in step
other ranks:  ------------------------------------------------+
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hiedit.config import MethodConfig
from hiedit.evaluation.lifelong import StreamProbe
from hiedit.evaluation.results import MethodResult
from hiedit.experiment import load_data, run_method
from hiedit.methods import load_editor
from hiedit.progress import Update
from hiedit.rl.training import TrainStep
from hiedit.run import checkpoints_of, hooks_of, run
from hiedit.runconfig import RunConfig
from hiedit.sharded.loading import load_sharded
from hiedit.sharded.ranks import Ranks, join, lost
from hiedit.sharded.training import ShardedTrainer, SharedCheckpoints


def run_sharded(
    config: RunConfig, methods: Sequence[MethodConfig] = (), *, editor: str | None = None
) -> list[MethodResult]:
    """``hiedit.run.run`` over the ranks that this process is one of; results on rank 0 only.

    Raises:
        ValueError: on a user's mistake, before any model is loaded.
        RankLost: if another rank ended; within ``distribution.timeout``.
    """
    d = config.distribution
    if d.kind != "deepspeed":
        raise ValueError(f"distribution.kind={d.kind}: this path is for deepspeed")
    ranks = join(d.timeout, d.ranks_per_worker)
    torch.set_num_threads(config.threads or 1)
    job = _Job(ranks)
    try:
        with lost():
            if ranks.main:
                return run(config, methods, editor=editor, task=job)
            for method in [None] if editor else list(methods) or [config.method]:
                job(config, method, editor, lambda message: None)
            return []
    finally:
        job.close()


class _Job:
    """One method on all ranks; model, data and probe are kept for the next one."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self._kept: tuple[Any, ...] | None = None

    def close(self) -> None:
        self._kept = None

    def __call__(
        self, config: RunConfig, method: MethodConfig | None, editor: str | None, send
    ) -> tuple[MethodResult, list[TrainStep]]:
        ranks, name = self.ranks, method.name if method else Path(editor).name
        send(Update(name, "load"))
        backbone, data, probe = self._prepared(config)

        hooks = hooks_of(config, name, send)
        if not ranks.main:
            hooks = dataclasses.replace(hooks, trained=lambda parts: None)
        ready = load_editor(backbone, editor, config.seed) if editor else None
        checkpoints = None
        if method and config.distribution.checkpoint_every:
            checkpoints = SharedCheckpoints.of(checkpoints_of(config, method), ranks)
        result, _, history = run_method(
            backbone, data, probe, method, config.train, config.measuring, config.seed,
            config.stream.n_edits, hooks, ready,
            lambda parts: ShardedTrainer(parts, config.train, ranks, config.seed), checkpoints,
        )  # fmt: skip
        send(Update(name, "done", 1, 1))
        return result, history

    def _prepared(self, config: RunConfig):
        if self._kept is None:
            data = load_data(config.dataset, config.stream, config.seed)
            model = dataclasses.replace(config.model)
            backbone = load_sharded(model, self.ranks, config.distribution.deepspeed)
            self._kept = backbone, data, StreamProbe(backbone, data.stream, config.evaluate.batch)
        return self._kept
