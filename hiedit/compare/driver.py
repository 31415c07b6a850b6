"""Runs an experiment: tune, choose, measure, report; every finished cell is kept.

driver:  config -> cells -> run_jobs (a process per core) -> chosen settings -> cells -> report
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hiedit.compare.cells import Cell, Setup, cell_path, read_cell
from hiedit.compare.config import CompareConfig, ExperimentConfig, apply
from hiedit.compare.measure import run_cell
from hiedit.compare.probing import probe_cells, run_probe
from hiedit.compare.worlds import prepare
from hiedit.experiment import check_modules
from hiedit.parallel import cores, run_jobs
from hiedit.progress import Progress, Update
from hiedit.provenance import environment_tags

Chosen = dict[tuple[str, str, int], dict[str, Any]]  # (world, label, horizon) -> setting


def setup_of(config: ExperimentConfig, world: str) -> Setup:
    return Setup(
        world,
        config.model,
        config.heterogeneous,
        config.train,
        config.retention_share,
        config.batch,
    )


def tune_cells(config: ExperimentConfig) -> list[Cell]:
    """One cell for every world, method with something to tune, setting and tuning seed; one
    stream serves all horizons, each of which is a beginning of the longest."""
    horizons = tuple(sorted(config.horizons))
    return [
        Cell(setup_of(config, world), "tune", seed, horizons, _with(config, label, setting))
        for world in config.worlds
        for label in config.methods
        for setting in config.settings(label)
        if len(config.settings(label)) > 1
        for seed in config.tuning.seeds
    ]


def measure_cells(config: ExperimentConfig, chosen: Chosen) -> list[Cell]:
    """The measurement of every world, method and seed; horizons with one setting share a cell."""
    cells = []
    for world in config.worlds:
        for label in config.methods:
            groups: dict[str, list[int]] = {}
            for horizon in sorted(config.horizons):
                setting = json.dumps(chosen[world, label, horizon], sort_keys=True)
                groups.setdefault(setting, []).append(horizon)
            for setting, horizons in groups.items():
                method = _with(config, label, json.loads(setting))
                setup = setup_of(config, world)
                cells += [
                    Cell(setup, "measure", seed, tuple(horizons), method) for seed in config.seeds
                ]
    return cells


def _with(config: ExperimentConfig, label: str, setting: dict[str, Any]):
    return apply(config.composition(label), setting, f"experiment.tuning: {label}")


def average(point: dict[str, Any], kind: str = "scores") -> float | None:
    """avg(ES, GS, LS) of a point, of those that were measured."""
    values = [point[kind][m] for m in ("ES", "GS", "LS") if point[kind][m] is not None]
    return sum(values) / len(values) if values else None


def choose(config: ExperimentConfig, run_dir: str) -> Chosen:
    """The setting with the best mean avg(ES, GS, LS) over the tuning seeds; the first of equals.

    Raises:
        ValueError: if a tuning cell is missing.
    """
    chosen: Chosen = {}
    for world in config.worlds:
        for label in config.methods:
            settings = config.settings(label)
            if len(settings) == 1:
                chosen |= {(world, label, h): settings[0] for h in config.horizons}
                continue
            table = [_tuned(config, run_dir, world, label, s) for s in settings]
            for horizon in config.horizons:
                best = max(range(len(settings)), key=lambda i: table[i][horizon])
                chosen[world, label, horizon] = settings[best]
    return chosen


def _tuned(config, run_dir, world, label, setting) -> dict[int, float]:
    """By horizon, the mean score of one setting over the tuning seeds."""
    horizons = tuple(sorted(config.horizons))
    found: dict[int, list[float]] = {h: [] for h in horizons}
    for seed in config.tuning.seeds:
        cell = Cell(setup_of(config, world), "tune", seed, horizons, _with(config, label, setting))
        result = read_cell(run_dir, cell)
        if result is None:
            raise ValueError(f"not yet tuned: {cell.describe()} with {setting}; run without report")
        for point in result["points"]:
            found[point["edits"]].append(average(point) or 0.0)
    return {h: sum(v) / len(v) for h, v in found.items()}


def compare(config: CompareConfig) -> Path:
    """Run what is missing of the experiment, then write and print its report; its directory.

    Raises:
        ValueError: on a user's mistake, before any expensive work.
    """
    from hiedit.compare.report import write_report

    experiment, out = config.experiment, Path(config.run_dir)
    if not config.report:
        check_modules(experiment.model)
        if config.dry_run:
            _say_plan(experiment, config.run_dir)
            return out
        _write_config(config, out)
        with Progress() as progress:
            for world in experiment.worlds:
                prepare(setup_of(experiment, world), out, lambda note: print(note, flush=True))
            run_all(config, "tune", tune_cells(experiment), progress)
            chosen = choose(experiment, config.run_dir)
            run_all(config, "measure", measure_cells(experiment, chosen), progress)
            setups = [setup_of(experiment, world) for world in experiment.worlds]
            run_all(config, "probe", probe_cells(experiment, setups, chosen), progress)
    write_report(experiment, config.run_dir)
    return out


def run_all(config: CompareConfig, phase: str, cells: Sequence[Cell], progress: Progress) -> None:
    """Run those of ``cells`` whose results are missing, the longest first."""
    missing = {c.key: c for c in cells if read_cell(config.run_dir, c) is None}
    todo = sorted(missing.values(), key=lambda c: (c.setup.world, -c.edits))
    if not cells:
        return
    print(f"{phase}: {len(todo)} of {len({c.key for c in cells})} cells to run", flush=True)
    if not todo:
        return
    total, done, finished = sum(c.edits for c in todo), 0, dict.fromkeys((c.key for c in todo), 0)

    def receive(message: tuple[int, Cell]) -> None:
        nonlocal done
        edits, cell = message
        done += edits
        finished[cell.key] += edits
        ready = sum(finished[c.key] >= c.edits for c in todo)
        progress.show(Update(phase, "edit", done, total, f"{ready}/{len(todo)} cells"))

    jobs = min(config.jobs or cores(), len(todo))
    work = run_probe if phase == "probe" else run_cell
    run_jobs(work, [(cell, config.run_dir) for cell in todo], jobs, receive)
    progress.show(Update(phase, "done", total, total))


def _say_plan(config: ExperimentConfig, run_dir: str) -> None:
    """What a run would do: cells and edits by phase and method."""
    tuning = tune_cells(config)
    untuned = {
        (w, m, h): config.settings(m)[0]
        for w in config.worlds
        for m in config.methods
        for h in config.horizons
    }
    for phase, cells in (("tune", tuning), ("measure, at least", measure_cells(config, untuned))):
        missing = [c for c in cells if not cell_path(run_dir, c).is_file()]
        edits = sum(c.edits for c in missing)
        print(f"{phase}: {len(cells)} cells, {len(missing)} to run, {edits} edits with training")
        for world in config.worlds:
            for label in config.methods:
                own = [c for c in cells if (c.setup.world, c.label) == (world, label)]
                if own:
                    edits = sum(c.edits for c in own)
                    print(f"  {world:<14} {label:<22} {len(own):>4} cells {edits:>8} edits")


def _write_config(config: CompareConfig, out: Path) -> None:
    """``config.json`` beside the cells, and where the code came from."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        about = dataclasses.asdict(config) | {"environment": environment_tags()}
        (out / "config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"run_dir={str(out)!r} cannot be written: {error.strerror}") from None
