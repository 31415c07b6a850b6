"""Runs an experiment: tune, choose, measure, report; every finished cell is kept.

driver:  config -> cells -> run_jobs (a process per core) -> chosen settings -> cells -> report
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from hiedit.compare.cells import Cell, cell_path, read_cell
from hiedit.compare.config import CompareConfig, ExperimentConfig
from hiedit.compare.grid import (
    choose,
    heterogeneous_setup,
    measure_cells,
    setup_of,
    tune_cells,
)
from hiedit.compare.measure import run_cell
from hiedit.compare.oracle import oracle_cells
from hiedit.compare.probing import probe_cells, run_probe
from hiedit.compare.report import write_report
from hiedit.compare.worlds import prepare
from hiedit.experiment import check_modules
from hiedit.parallel import cores, run_jobs
from hiedit.progress import Progress, Update
from hiedit.provenance import environment_tags


def compare(config: CompareConfig) -> Path:
    """Run what is missing of the experiment, then write and print its report; its directory.

    Raises:
        ValueError: on a user's mistake, before any expensive work.
    """
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
            oracle = oracle_cells(experiment, heterogeneous_setup(experiment))
            run_all(config, "oracle", [c for own in oracle.values() for c in own], progress)
            setups = [setup_of(experiment, world) for world in experiment.worlds]
            run_all(config, "probe", probe_cells(experiment, setups, chosen), progress)
    write_report(experiment, config.run_dir)
    return out


def run_all(config: CompareConfig, phase: str, cells: Sequence[Cell], progress: Progress) -> None:
    """Run those of ``cells`` whose results are missing, the longest first, and among equals seed by
    seed: what an interrupted run has measured can be compared."""
    missing = {c.key: c for c in cells if read_cell(config.run_dir, c) is None}
    todo = sorted(missing.values(), key=lambda c: (c.setup.world, -c.edits, c.seed))
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
    """Return what a run would do: cells and edits by phase and method."""
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
