"""Does the policy choose what independent probes point at? Rank correlations and heat maps.

Two probes that know nothing of the policy, on the unedited model: the effect of each module alone
(rl/effects.py) and causal tracing (evaluation/probes.py).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hiedit.compare.cells import Cell, Setup, read_cell, write_cell
from hiedit.compare.config import ExperimentConfig, apply
from hiedit.compare.figures import plot_heat
from hiedit.compare.measure import trained
from hiedit.compare.tables import table as markdown_table
from hiedit.compare.worlds import load_world
from hiedit.data.tokens import encode
from hiedit.evaluation.probes import PLACES, causal_tracing
from hiedit.evaluation.statistics import mean
from hiedit.rl.effects import effects_by_edit
from hiedit.world.train import use_threads

PROBES = ("effect", *(f"tracing at the {place} token" for place in PLACES))
RESAMPLES = 1000


def probe_cells(config: ExperimentConfig, setups: Sequence[Setup], chosen: Mapping) -> list[Cell]:
    """One for every world and policy: the setting of the shortest horizon, the first seed (whose
    editor the measurement trained already)."""
    p = config.probes
    if not p.edits:
        return []
    found = []
    for setup in setups:
        for label in filter(config.horizons_of, p.policies):
            first = min(config.horizons_of(label))
            method = apply(config.composition(label), chosen[setup.world, label, first], label)
            extra = (("noise", p.noise), ("samples", p.samples))
            found.append(Cell(setup, "probe", config.seeds[0], (p.edits,), method, extra))
    return found


@use_threads(1)
def run_probe(cell: Cell, run_dir: str, send: Callable[[Any], None]) -> dict[str, Any]:
    """Probe the test edits of ``cell`` and write what was found, unless it is there."""
    found = read_cell(run_dir, cell)
    if found is None:
        found = _probe(cell, run_dir, send)
        write_cell(run_dir, cell, found)
    return found


def _probe(cell: Cell, run_dir: str, send) -> dict[str, Any]:
    world = load_world(cell.setup, run_dir)
    method, _ = trained(cell, world, run_dir, lambda n: send((n, cell)))
    rollout, extra = method.rollout, dict(cell.extra)
    rollout.reset()
    requests = world.stream("probe", cell.horizons[-1], cell.seed)
    logits, masks = [], []
    for request in requests:
        pair = [(request.prompt, request.target)]
        batch = encode(world.backbone.tokenizer, pair, padding_side="left")
        tokens = rollout.updater.config.tokens
        probe = rollout.env.probe(batch.to(world.backbone.device), 1, tokens)
        signals = rollout.told(probe.signals())
        with torch.no_grad():
            action = rollout.selector(signals)
        if action.logits is None:
            raise ValueError(
                f"experiment.probes.policies: {cell.label!r} has no policy whose choices could be "
                "correlated; name a method with selector.kind=policy"
            )
        logits.append(action.logits[0].tolist())
        masks.append(action.mask[0].tolist())
    effect = effects_by_edit(rollout.env, rollout.updater, requests)
    tracing = causal_tracing(
        world.backbone, requests, extra["samples"], extra["noise"], cell.seed,
        lambda: send((1, cell)),
    )  # fmt: skip
    return {
        "modules": rollout.updater.names,
        "relations": [r.relation for r in requests],
        "logits": logits,
        "masks": masks,
        PROBES[0]: effect.tolist(),
        **{PROBES[1 + i]: tracing[..., i].tolist() for i in range(len(PLACES))},
    }


def probe_report(
    config: ExperimentConfig, setups: Sequence[Setup], run_dir: str, chosen: Mapping
) -> tuple[dict[str, Any] | None, list[Path]]:
    """(correlations and their table as text, heat maps drawn) of the probe cells that are there."""
    found, drawn, parts = {}, [], []
    for cell in probe_cells(config, setups, chosen):
        result = read_cell(run_dir, cell)
        if result is None:
            continue
        table = correlations(result)
        found[f"{cell.setup.world}/{cell.label}"] = table
        parts.append(_text(cell, table, len(result["relations"])))
        drawn += _draw(cell, result, Path(run_dir))
    return ({"correlations": found, "text": "\n\n".join(parts)} if found else None), drawn


def correlations(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return, by probe, Spearman's rho between the policy's logits and the probe over the modules
    of an edit, mean over edits with a 95% bootstrap interval over edits, overall (``all``) and by
    relation; and ``of_means``, the rho of the two means over edits (what a fixed choice can know).
    """
    found: dict[str, dict[str, Any]] = {}
    for probe in PROBES:
        by_relation: dict[str, list[float]] = {"all": []}
        for relation, logits, values in zip(
            result["relations"], result["logits"], result[probe], strict=True
        ):
            rho = spearman(logits, values)
            if rho is not None:
                by_relation["all"].append(rho)
                by_relation.setdefault(str(relation), []).append(rho)
        found[probe] = {k: _interval(v) for k, v in by_relation.items() if v}
        sound = [i for i, v in enumerate(result[probe]) if None not in v]
        means = [
            [mean(column) for column in zip(*(rows[i] for i in sound), strict=True)]
            for rows in (result["logits"], result[probe])
        ]
        found[probe]["of_means"] = spearman(*means) if sound else None
    return found


def spearman(a: Sequence[float], b: Sequence[float | None]) -> float | None:
    """Spearman's rank correlation; None where it is not defined (a constant or a missing value)."""
    if any(v is None or not math.isfinite(v) for v in (*a, *b)):
        return None
    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    from scipy import stats

    return float(stats.spearmanr(a, b).statistic)


def _interval(values: Sequence[float]) -> dict[str, Any]:
    """mean, 95% percentile bootstrap interval and number of ``values``."""
    rng = random.Random(0)
    means = sorted(mean(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    low, high = means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]
    return {"mean": mean(values), "low": low, "high": high, "n": len(values)}


def _text(cell: Cell, table: Mapping[str, Mapping[str, Any]], edits: int) -> str:
    keys = [k for k in dict.fromkeys(k for t in table.values() for k in t) if k != "of_means"]
    lines = []
    for key in keys:
        line = [key, str(max(t[key]["n"] for t in table.values() if key in t))]
        for probe in PROBES:
            one = table[probe].get(key)
            line.append(f"{one['mean']:+.2f} ({one['low']:+.2f} to {one['high']:+.2f})"
                        if one else "–")  # fmt: skip
        lines.append(line)
    of_means = [table[probe]["of_means"] for probe in PROBES]
    lines.append(["means over edits", "1", *("–" if v is None else f"{v:+.2f}" for v in of_means)])
    title = f"## Probes: {cell.setup.world}, {cell.label}"
    what = f"Spearman's rho of the policy's logits with each probe over the modules, {edits} edits"
    body = markdown_table(["relation", "edits", *PROBES], lines)
    return f"{title}\n\n{what}; mean and 95% bootstrap interval over edits.\n\n{body}"


def _draw(cell: Cell, result: Mapping[str, Any], out: Path) -> list[Path]:
    """The heat map, relations by modules, of the policy and of each probe."""
    panels: dict[str, dict[str, list[float]]] = {}
    for title, key in (("policy (logits)", "logits"), *((p, p) for p in PROBES)):
        groups: dict[str, list[list[float]]] = {}
        for relation, row in zip(result["relations"], result[key], strict=True):
            if None not in row:
                groups.setdefault(str(relation), []).append(row)
        if groups:
            panels[title] = {
                r: [mean(c) for c in zip(*rows, strict=True)] for r, rows in sorted(groups.items())
            }
    try:
        figure = plot_heat(panels, result["modules"])
    except ImportError as error:
        print(f"No plots: {error}")
        return []
    path = out / f"probes_{cell.setup.world}_{cell.label}.png"
    figure.savefig(path, dpi=150)
    return [path]
