"""A whole run as its users see it: progress, tracking, results.json, plots, table, the editors.

driver:  config -> tasks (a method each) -> jobs -> results.json, plots, MLflow, table
job:     model, records, stream (once per process) -> build, train, edit, measure -> result
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hiedit.config import MethodConfig, from_mapping
from hiedit.evaluation.lifelong import StreamProbe
from hiedit.evaluation.report import report
from hiedit.evaluation.results import MethodResult, write_results
from hiedit.experiment import Hooks, check_modules, load_backbone, load_data, run_method
from hiedit.methods import Method, load_editor, read_editor, save_editor
from hiedit.parallel import cores, run_jobs
from hiedit.progress import Progress, Update
from hiedit.rl.checkpoint import Checkpoints
from hiedit.rl.training import TrainStep
from hiedit.runconfig import DatasetConfig, ModelConfig, RunConfig, StreamConfig
from hiedit.tracking import make_tracker

TRAIN_METRICS = ("loss", "paraphrase", "locality", "size", "layers", "passes")
# Where a method stands, or one of its training edits with what else is known of the training.
Send = Callable[[Update | tuple[str, TrainStep, dict[str, float]]], None]


def run(
    config: RunConfig,
    methods: Sequence[MethodConfig] = (),
    *,
    editor: str | None = None,
    jobs: int = 1,
    task: Callable | None = None,
) -> list[MethodResult]:
    """Train and evaluate ``config.method`` (or each of ``methods``, ``jobs`` at a time) on one
    stream; print and save. ``editor`` is the directory of a trained editor to evaluate instead.
    ``task`` does one method in place of ``run_task``, in this process.

    Raises:
        ValueError: on a user's mistake, before any expensive work.
    """
    start = time.perf_counter()
    methods = [None] if editor else list(methods) or [config.method]
    out = Path(config.run_dir)
    if config.distribution.kind == "ray":
        from hiedit.distributed import require_ray

        require_ray()
        jobs = 1  # the workers are what runs at a time
    _check(config, out, editor)
    write_config(out, config)
    if task is not None:
        jobs = 1
    jobs = min(len(methods), jobs or (1 if torch.cuda.is_available() else min(4, cores())))
    if config.threads:
        torch.set_num_threads(config.threads)
    place = dict(run_name=out.name, directory=out.parent, seed=config.seed)
    tracking = config.tracking
    tracker = make_tracker(tracking.mode, tracking.uri, tracking.experiment, **place)
    with tracker:
        tracker.params(dataclasses.asdict(config))
        with Progress() as progress:

            def receive(message: Update | tuple[str, TrainStep, dict]) -> None:
                if isinstance(message, Update):
                    progress.show(message)
                else:
                    name, step, status = message
                    tracker.metrics(step.edit, _metrics(step) | status, method=name)

            tasks = [(config, method, editor) for method in methods]
            done = run_jobs(task or run_task, tasks, jobs, receive)
        results = [result for result, _ in done]
        histories = {r.method: history for r, history in done if history}
        paths = _save(out, config, results, histories)
        tracker.results(results, baseline=_baseline(results))
        for path in paths:
            tracker.artifact(path)
        report(results, examples=config.evaluate.examples)
        print(f"{len(results)} method(s) in {time.perf_counter() - start:.0f} s; written:")
        for path in paths:
            print(f"  {path}")
    return results


def run_task(
    config: RunConfig, method: MethodConfig | None, editor: str | None, send: Send
) -> tuple[MethodResult, list[TrainStep]]:
    """One method (or trained editor) from start to end, in whatever process this is."""
    name = method.name if method else Path(editor).name
    send(Update(name, "load"))
    backbone, data, probe = _prepared(config)

    def on_train(step: TrainStep, total: int) -> None:
        note = f"loss {step.loss:.2f}, {step.layers:.0f} layers, {step.passes} passes"
        status = trainer.status() if trainer else {}
        note += "".join(f", {key} {value:g}" for key, value in status.items())
        send(Update(name, "train", step.edit, total, note))
        send((name, step, {f"train/{key}": value for key, value in status.items()}))

    hooks = Hooks(
        train=on_train,
        edit=lambda done, total: send(Update(name, "edit", done, total)),
        stage=lambda stage: send(Update(name, stage)),
        trained=lambda parts: save_editor(parts, Path(config.run_dir) / "editors" / name),
    )
    ready = load_editor(backbone, editor, config.seed) if editor else None
    train, evaluate = config.train, config.evaluate
    n_edits = config.stream.n_edits
    trainer, checkpoints = None, None

    def make_trainer(parts: Method):
        nonlocal trainer
        from hiedit.distributed.trainer import RayTrainer

        trainer = RayTrainer(parts, config.model, config.distribution)
        return trainer

    if method and config.distribution.checkpoint_every:
        checkpoints = checkpoints_of(config, method)
    result, _, history = run_method(
        backbone,
        data,
        probe,
        method,
        train,
        evaluate,
        config.seed,
        n_edits,
        hooks,
        ready,
        make_trainer if config.distribution.kind == "ray" else None,
        checkpoints,
    )
    send(Update(name, "done", 1, 1))
    return result, history


def checkpoints_of(config: RunConfig, method: MethodConfig) -> Checkpoints:
    """Where the training of ``method`` in this run keeps its state. It can be continued by a run
    that trains the same on the same: where results go and how often it is saved may differ."""
    same = {key: dataclasses.asdict(getattr(config, key)) for key in ("model", "dataset", "train")}
    same |= {"method": dataclasses.asdict(method), "seed": config.seed}
    d = config.distribution
    same |= {"workers": d.workers, "mode": d.mode}
    place = Path(config.run_dir) / "checkpoints" / method.name
    return Checkpoints(place, d.checkpoint_every, d.keep, same, config.resume)


def write_config(out: Path, config: RunConfig) -> None:
    """``config.json``: what ``resume`` reads."""
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")


def read_config(run_dir: str | Path) -> RunConfig:
    """The configuration of the run in ``run_dir``, to be continued there.

    Raises:
        ValueError: if there is none, or it is damaged.
    """
    path = Path(run_dir) / "config.json"
    if not path.is_file():
        raise ValueError(f"resume={str(run_dir)!r}: there is no run (no config.json)")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    config = from_mapping(RunConfig, values)
    return dataclasses.replace(config, run_dir=str(run_dir), resume=True)


@functools.lru_cache(maxsize=1)  # one model at a time; the configs are given as JSON to be hashable
def _loaded(model: str, dataset: str, stream: str, seed: int, batch: int):
    data = load_data(
        from_mapping(DatasetConfig, json.loads(dataset)),
        from_mapping(StreamConfig, json.loads(stream)),
        seed,
    )
    backbone = load_backbone(from_mapping(ModelConfig, json.loads(model)))
    return backbone, data, StreamProbe(backbone, data.stream, batch)


def _prepared(config: RunConfig):
    """Model, data and probe, kept for the next method of this process."""
    parts = (config.model, config.dataset, config.stream)
    keys = (json.dumps(dataclasses.asdict(part)) for part in parts)
    return _loaded(*keys, config.seed, config.evaluate.batch)


def _metrics(step: TrainStep) -> dict[str, float]:
    return {f"train/{key}": getattr(step, key) for key in TRAIN_METRICS}


def _baseline(results: list[MethodResult]) -> str | None:
    """The method that the others' gains are counted from: the random control where it ran."""
    names = [r.method for r in results]
    return "random" if "random" in names else names[0] if len(names) > 1 else None


def _check(config: RunConfig, out: Path, editor: str | None) -> None:
    """Everything that can be wrong and is cheap to find out: output, modules, records."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise ValueError(f"run_dir={str(out)!r} cannot be written: {error.strerror}") from None
    modules = check_modules(config.model)
    if editor:
        read_editor(editor, modules)
    data = load_data(config.dataset, config.stream, config.seed)
    skipped = f" ({data.skipped} malformed rows skipped)" if data.skipped else ""
    print(
        f"model {config.model.name}, {len(modules)} editable modules; records "
        f"{config.dataset.name}: {len(data.train)} for training{skipped}, stream of "
        f"{len(data.stream)} held-out edits, {config.stream.n_edits} per step",
        flush=True,
    )


def _save(out: Path, config: RunConfig, results, histories) -> list[Path]:
    paths = [write_results(out, results), out / "details.json"]
    training = {
        name: [{"edits": s.edit, **{k: getattr(s, k) for k in TRAIN_METRICS}} for s in history]
        for name, history in histories.items()
    }
    if training:
        (out / "training.json").write_text(json.dumps(training) + "\n")
        paths.append(out / "training.json")
    try:
        from hiedit.plots import save_plots

        paths += save_plots(results, out, training or None)
    except ImportError as error:
        print(f"No plots: {error}")
    if training:
        paths.append(out / "editors")
    return paths
