"""A whole run as its users see it: progress, tracking, results.json, plots, table, the editors.

driver:  config -> tasks (a method each) -> jobs -> results.json, plots, MLflow, table
         where training is handed in: first model, records -> train -> an editor for its task
job:     model, records, stream (once per process) -> build, train, edit, measure -> result
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from hiedit.backbone.model import Backbone
from hiedit.calibrating import measured, named_already
from hiedit.config import MethodConfig, from_mapping
from hiedit.data.passages import neutral_texts
from hiedit.evaluation.lifelong import StreamProbe, with_training
from hiedit.evaluation.report import report
from hiedit.evaluation.results import MethodResult, write_results
from hiedit.experiment import (
    KNOWN,
    Data,
    Hooks,
    check_modules,
    load_backbone,
    load_data,
    run_method,
)
from hiedit.known import asked
from hiedit.methods import load_editor, read_editor, save_editor
from hiedit.parallel import cores, run_jobs
from hiedit.progress import Progress, Update
from hiedit.rl.checkpoint import Checkpoints, interruptible
from hiedit.rl.training import TrainStep
from hiedit.runconfig import DatasetConfig, ModelConfig, RunConfig, StreamConfig
from hiedit.tracking import make_tracker

TRAIN_METRICS = ("loss", "paraphrase", "locality", "size", "layers", "passes")


@dataclass(frozen=True)
class Metrics:
    """Figures for the tracker of the training of ``method`` after ``edit`` edits."""

    method: str
    edit: int
    values: dict[str, float]


Send = Callable[[Update | Metrics], None]
History = list[TrainStep]
TrainAll = Callable[[RunConfig, Sequence[MethodConfig], Send], dict[str, tuple[float, History]]]


class Executor(Protocol):
    """Does one method (or evaluates one trained editor) from start to end."""

    def __call__(
        self, config: RunConfig, method: MethodConfig | None, editor: str | None, send: Send
    ) -> tuple[MethodResult, History]: ...


def run(
    config: RunConfig,
    methods: Sequence[MethodConfig] = (),
    *,
    editor: str | None = None,
    jobs: int = 1,
    task: Executor | None = None,
    train: TrainAll | None = None,
) -> list[MethodResult]:
    """Train and evaluate ``config.method`` (or each of ``methods``, ``jobs`` at a time) on one
    stream; print and save. ``editor`` is the directory of a trained editor to evaluate instead.
    ``task`` does one method in place of ``run_task``, in this process; ``train`` trains those that
    learn before any is evaluated. ``hiedit.distributed.executors`` chooses them by the config.

    Raises:
        ValueError: on a user's mistake, before any expensive work; for a run on Ray without either.
        Interrupted: after SIGINT or SIGTERM; no process stays.
    """
    start = time.perf_counter()
    methods = [None] if editor else list(methods) or [config.method]
    out = Path(config.run_dir)
    ahead = [m for m in methods if m and task is None and learns(config, m)]
    if ahead and train is None and config.distribution.kind == "ray":
        raise ValueError(
            "distribution.kind=ray: hiedit.distributed.executors.execute runs it; this call trains "
            "in its own process (kind=local)"
        )
    ahead = ahead if train is not None else []
    if task is None:  # which every rank has to do alike
        config = named_already(config, editor)
    _check(config, out, editor)
    if task is None:
        config = asked(measured(config), any(m and learns(config, m) for m in methods))
    write_config(out, config)
    if task is not None:
        jobs = 1
    jobs = min(len(methods), jobs or (1 if torch.cuda.is_available() else min(4, cores())))
    if config.threads:
        torch.set_num_threads(config.threads)
    place = dict(run_name=out.name, directory=out.parent, seed=config.seed)
    tracking = config.tracking
    tracker = make_tracker(tracking.mode, tracking.uri, tracking.experiment, **place)
    with interruptible(), tracker:
        tracker.params(dataclasses.asdict(config))
        with Progress() as progress:

            def receive(message: Update | Metrics) -> None:
                if isinstance(message, Update):
                    progress.show(message)
                else:
                    tracker.metrics(message.edit, message.values, method=message.method)

            trained = train(config, ahead, receive) if ahead else {}
            places = [editor_place(config, m) if m in ahead else editor for m in methods]
            tasks = [(config, m, place) for m, place in zip(methods, places, strict=True)]
            done = _longest_first(config, task or run_task, tasks, jobs, receive)
        results, histories = _joined(done, trained)
        paths = _save(out, config, results, histories)
        tracker.results(results, baseline=_baseline(results))
        for path in paths:
            tracker.artifact(path)
        report(results, examples=config.evaluate.examples)
        print(f"{len(results)} method(s) in {time.perf_counter() - start:.0f} s; written:")
        for path in paths:
            print(f"  {path}")
    return results


def _longest_first(config: RunConfig, work: Callable, tasks: list, jobs: int, send: Send) -> list:
    """``run_jobs``, those methods first that train here; results in the order of ``tasks``."""

    def trains(index: int) -> bool:
        _, method, editor = tasks[index]
        return bool(method) and not editor and learns(config, method)

    order = sorted(range(len(tasks)), key=trains, reverse=True) if jobs > 1 else range(len(tasks))
    done = dict(zip(order, run_jobs(work, [tasks[i] for i in order], jobs, send), strict=True))
    return [done[i] for i in range(len(tasks))]


def run_task(
    config: RunConfig, method: MethodConfig | None, editor: str | None, send: Send
) -> tuple[MethodResult, list[TrainStep]]:
    """One method (or trained editor) from start to end, in whatever process this is."""
    name = method.name if method else Path(editor).name
    send(Update(name, "load"))
    backbone, data, probe = _prepared(config)
    ready = load_editor(backbone, editor, config.seed) if editor else None
    checkpoints = checkpoints_of(config, method) if method and not editor else None
    result, _, history = run_method(
        backbone,
        data,
        probe,
        method,
        config.train,
        config.measuring,
        config.seed,
        config.stream.n_edits,
        hooks_of(config, name, send),
        ready,
        checkpoints=checkpoints,
    )
    send(Update(name, "done", 1, 1))
    return result, history


def hooks_of(
    config: RunConfig, name: str, send: Send, status: Callable[[], dict] | None = None
) -> Hooks:
    """Progress of one method to ``send``; with ``status``, of the workers, too, and then metrics
    come with the versions, not with every edit."""

    def on_train(step: TrainStep, total: int) -> None:
        note = f"reward {-step.loss:.2f}, {step.layers:.0f} layers, {step.passes} passes"
        for key, value in status().items() if status else ():
            if value or key in ("workers", "version"):
                note += f", {key} {value:.3g}"
        send(Update(name, "train", step.edit, total, note))
        if status is None:
            send(of_version(name, [step], {}))

    return Hooks(
        train=on_train,
        edit=lambda done, total: send(Update(name, "edit", done, total)),
        stage=lambda stage: send(Update(name, stage)),
        trained=lambda parts: save_editor(parts, editor_place(config, name)),
    )


def of_version(name: str, steps: list[TrainStep], status: dict[str, float]) -> Metrics:
    """The means over ``steps``, those that are numbers, and where the training stands."""
    values = dict(status)
    for key in TRAIN_METRICS:
        found = [v for step in steps if math.isfinite(v := getattr(step, key))]
        values[key] = sum(found) / len(found) if found else math.nan
    return Metrics(name, steps[-1].edit, {f"train/{key}": v for key, v in values.items()})


def learns(config: RunConfig, method: MethodConfig) -> bool:
    return method.trains and config.train.edits > 0


def editor_place(config: RunConfig, method: MethodConfig | str) -> str:
    """Return where the trained editor of ``method`` is saved."""
    name = method if isinstance(method, str) else method.name
    return str(Path(config.run_dir) / "editors" / name)


def _joined(done, trained) -> tuple[list[MethodResult], dict[str, list[TrainStep]]]:
    """Results with what their training took, and histories by method."""
    results, histories = [], {r.method: history for r, history in done if history}
    for result, _ in done:
        if result.method in trained:
            seconds, histories[result.method] = trained[result.method]
            result = with_training(result, seconds, histories[result.method][-1].edit)
        results.append(result)
    return results, histories


def checkpoints_of(config: RunConfig, method: MethodConfig) -> Checkpoints | None:
    """Return where the training of ``method`` in this run keeps its state, if it does. It can be
    continued by a run that trains the same on the same: where results go and how often it is saved
    may differ."""
    if not config.distribution.checkpoint_every:
        return None
    same = {key: dataclasses.asdict(getattr(config, key)) for key in ("model", "dataset", "train")}
    same |= {"method": dataclasses.asdict(method), "seed": config.seed}
    d = config.distribution
    same |= {"workers": d.workers, "mode": d.mode, "gradient_dtype": d.gradient_dtype}
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
def _loaded(model: str, dataset: str, stream: str, seed: int) -> tuple[Backbone, Data]:
    data = load_data(
        from_mapping(DatasetConfig, json.loads(dataset)),
        from_mapping(StreamConfig, json.loads(stream)),
        seed,
    )
    return load_backbone(from_mapping(ModelConfig, json.loads(model))), data


@functools.lru_cache(maxsize=1)
def _probe(*keys, batch: int) -> StreamProbe:
    backbone, data = _loaded(*keys)
    return StreamProbe(backbone, data.stream, batch)


def loaded(config: RunConfig) -> tuple[Backbone, Data]:
    """Model and records, kept for the next method of this process."""
    return _loaded(*_keys(config))


def _keys(config: RunConfig) -> tuple:
    parts = (config.model, config.dataset, config.stream)
    return (*(json.dumps(dataclasses.asdict(part)) for part in parts), config.seed)


def _prepared(config: RunConfig) -> tuple[Backbone, Data, StreamProbe]:
    """Model, data and probe, kept for the next method of this process."""
    keys = _keys(config)
    return *_loaded(*keys), _probe(*keys, batch=config.evaluate.batch)


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
    neutral_texts(config.evaluate.neutral)
    about = f"model {config.model.name}, {len(modules)} editable modules"
    about += "" if config.model.modules else " by default"
    if config.dataset.path == KNOWN:
        print(about, flush=True)
        return
    data = load_data(config.dataset, config.stream, config.seed)
    skipped = f" ({data.skipped} malformed rows skipped)" if data.skipped else ""
    print(
        f"{about}; records {config.dataset.name}: {len(data.train)} for training{skipped}, stream "
        f"of {len(data.stream)} held-out edits, {config.stream.n_edits} per step",
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
