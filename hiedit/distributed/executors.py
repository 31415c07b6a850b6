"""The executor that a configuration asks for: this process, workers on Ray, or groups of ranks.

``hiedit.run.run`` knows none of them: it gets what trains, or what does a whole method, handed in.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from hiedit.config import MethodConfig
from hiedit.evaluation.results import MethodResult
from hiedit.experiment import train_method
from hiedit.methods import Method
from hiedit.progress import Update
from hiedit.rl.training import TrainStep
from hiedit.run import Send, checkpoints_of, hooks_of, learns, loaded, of_version, run
from hiedit.runconfig import RunConfig


def execute(
    config: RunConfig,
    methods: Sequence[MethodConfig] = (),
    *,
    editor: str | None = None,
    jobs: int = 1,
) -> list[MethodResult]:
    """``hiedit.run.run``, by what ``config.distribution`` asks for.

    On Ray the methods are trained one after the other, each by all workers, and then evaluated,
    ``jobs`` at a time; where a worker is a group of ranks, by the first group, see
    ``hiedit.distributed.grouped``.

    Raises:
        ImportError: if Ray is asked for and not installed, with the remedy.
    """
    d = config.distribution
    if editor or d.kind != "ray":
        return run(config, methods, editor=editor, jobs=jobs)
    if d.grouped:
        from hiedit.distributed.grouped import run_grouped

        return run_grouped(config, methods)
    if any(learns(config, method) for method in methods or [config.method]):
        from hiedit.distributed import require_ray

        require_ray()
    return run(config, methods, jobs=jobs, train=train_on_ray)


def train_on_ray(
    config: RunConfig, methods: Sequence[MethodConfig], send: Send
) -> dict[str, tuple[float, list[TrainStep]]]:
    """Train each of ``methods`` with all workers and save its editor in the run's directory.

    Returns by name (seconds, history).
    """
    from hiedit.distributed.session import session

    with session(config.distribution):
        return {method.name: _train_one(config, method, send) for method in methods}


def _train_one(
    config: RunConfig, method: MethodConfig, send: Send
) -> tuple[float, list[TrainStep]]:
    from hiedit.distributed.trainer import RayTrainer

    start, name = time.perf_counter(), method.name
    send(Update(name, "load"))
    backbone, data = loaded(config)
    trainer = None

    def make(parts: Method) -> RayTrainer:
        nonlocal trainer
        trainer = RayTrainer(parts, config.model, config.distribution, on_version)
        return trainer

    def on_version(steps: list[TrainStep]) -> None:
        send(of_version(name, steps, trainer.status()))

    hooks = hooks_of(config, name, send, lambda: trainer.status())
    checkpoints = checkpoints_of(config, method)
    _, history = train_method(
        backbone, data, method, config.train, config.seed, hooks, make, checkpoints
    )
    return time.perf_counter() - start, history
