"""The cells of an experiment, and the settings that its tuning chose."""

from __future__ import annotations

import json
from typing import Any

from hiedit.compare.cells import Cell, Setup, read_cell
from hiedit.compare.config import ExperimentConfig, apply

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


def heterogeneous_setup(config: ExperimentConfig) -> Setup | None:
    return setup_of(config, "heterogeneous") if "heterogeneous" in config.worlds else None


def tune_cells(config: ExperimentConfig) -> list[Cell]:
    """One cell for every world, method with something to tune, setting and tuning seed; one
    stream serves all horizons, each of which is a beginning of the longest."""
    return [
        Cell(setup_of(config, world), "tune", seed, horizons, _with(config, label, setting))
        for world in config.worlds
        for label in config.methods
        if (horizons := config.horizons_of(label))
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
            for horizon in config.horizons_of(label):
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
    """The setting with the best mean avg(ES, GS, LS) over the tuning seeds, at each horizon or
    over all of them; the first of equals.

    Raises:
        ValueError: if a tuning cell is missing.
    """
    chosen: Chosen = {}
    for world in config.worlds:
        for label in config.methods:
            settings, horizons = config.settings(label), config.horizons_of(label)
            if len(settings) == 1 or not horizons:
                chosen |= {(world, label, h): settings[0] for h in horizons}
                continue
            table = [_tuned(config, run_dir, world, label, s) for s in settings]
            for horizon in horizons:
                counts = [horizon] if config.tuning.per_horizon else horizons
                best = max(range(len(settings)), key=lambda i: sum(table[i][h] for h in counts))
                chosen[world, label, horizon] = settings[best]
    return chosen


def tuning(config: ExperimentConfig, run_dir: str, chosen: Chosen) -> list[dict[str, Any]]:
    """Return what tuning found: for every world, method and setting, ``scores`` by horizon, the
    mean avg(ES, GS, LS) over the tuning seeds, and the horizons it was ``chosen`` at."""
    return [
        {
            "world": world,
            "method": label,
            "setting": setting,
            "scores": _tuned(config, run_dir, world, label, setting),
            "chosen": [h for h in horizons if chosen[world, label, h] == setting],
        }
        for world in config.worlds
        for label in config.methods
        if (horizons := config.horizons_of(label)) and len(settings := config.settings(label)) > 1
        for setting in settings
    ]


def _tuned(config, run_dir, world, label, setting) -> dict[int, float]:
    """Return, by horizon, the mean score of one setting over the tuning seeds."""
    horizons = config.horizons_of(label)
    found: dict[int, list[float]] = {h: [] for h in horizons}
    for seed in config.tuning.seeds:
        cell = Cell(setup_of(config, world), "tune", seed, horizons, _with(config, label, setting))
        result = read_cell(run_dir, cell)
        if result is None:
            raise ValueError(f"not yet tuned: {cell.describe()} with {setting}; run without report")
        for point in result["points"]:
            found[point["edits"]].append(average(point) or 0.0)
    return {h: sum(v) / len(v) for h, v in found.items()}
