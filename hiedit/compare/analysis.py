"""Findings of the cells: rows, means with intervals, paired tests with Holm's correction, truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hiedit.compare.cells import read_cell
from hiedit.compare.config import ExperimentConfig
from hiedit.compare.grid import Chosen, average, measure_cells
from hiedit.evaluation.statistics import Paired, compare, confidence_interval, holm, mean, sd

METRICS = ("avg", "ES", "GS", "LS", "retention")
COSTS = ("layers_per_edit", "passes_per_edit", "seconds_per_edit", "train_seconds")


@dataclass(frozen=True)
class Summary:
    """One method at one horizon of one world over its seeds; by metric: mean, sd, low, high
    (fractions; 95% interval of the mean by Student's t, None below two seeds)."""

    world: str
    method: str
    horizon: int
    seeds: tuple[int, ...]
    values: Mapping[str, tuple[float, float | None, float | None, float | None]]
    setting: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """``method`` against ``baseline`` on avg(ES, GS, LS), paired over seeds and streams.

    relative: of the baseline's mean (0.0848 is the paper's margin over dense editing). t_holm,
    permutation_holm: p-values corrected over all comparisons of the report.
    """

    world: str
    horizon: int
    method: str
    baseline: str
    paired: Paired
    relative: float | None
    t_holm: float | None = None
    permutation_holm: float | None = None


def rows_of(
    config: ExperimentConfig, run_dir: str, chosen: Chosen
) -> tuple[list[dict[str, Any]], list[str]]:
    """(one row per world, method, seed and horizon; what is not measured yet, in words)."""
    rows, missing = [], []
    for cell in measure_cells(config, chosen):
        result = read_cell(run_dir, cell)
        if result is None:
            missing.append(cell.describe())
            continue
        for point in result["points"]:
            row = {
                "world": cell.setup.world,
                "method": cell.label,
                "seed": cell.seed,
                "edits": point["edits"],
                "stream": point["stream"],
                "asked": point["asked"],
                "avg": average(point),
                "retention": average(point, "retention"),
                "train_seconds": result["train_seconds"],
                "cpu_seconds": result["cpu_seconds"],
            }
            row |= {m: point["scores"][m] for m in ("ES", "GS", "LS")}
            row |= {f"retention_{m}": point["retention"][m] for m in ("ES", "GS", "LS")}
            row |= {c: point[c] for c in ("layers_per_edit", "passes_per_edit", "seconds_per_edit")}
            rows.append(row)
    return rows, missing


def summaries(
    config: ExperimentConfig, rows: Sequence[Mapping[str, Any]], chosen: Chosen
) -> list[Summary]:
    """One for every world, horizon and method that has rows, in the configured order."""
    found = []
    for world in config.worlds:
        for horizon in sorted(config.horizons):
            for label in config.methods:
                own = pick(rows, world, horizon, label)
                if not own:
                    continue
                values = {}
                for metric in (*METRICS, *COSTS):
                    known = [r[metric] for r in own if r[metric] is not None]
                    if known:
                        low, high = confidence_interval(known) or (None, None)
                        values[metric] = (mean(known), sd(known), low, high)
                seeds = tuple(r["seed"] for r in own)
                setting = chosen[world, label, horizon]
                found.append(Summary(world, label, horizon, seeds, values, setting))
    return found


def pick(rows, world: str, horizon: int, label: str | None = None) -> list[Mapping[str, Any]]:
    """The rows of one world, horizon and (if given) method."""
    return [
        r
        for r in rows
        if r["world"] == world and r["edits"] == horizon and label in (None, r["method"])
    ]


def comparisons(config: ExperimentConfig, rows) -> list[Comparison]:
    """The learned method against every baseline at every horizon of every world. Where one lacks a
    seed that the other has, only the seeds of both count."""
    found = []
    for world in config.worlds:
        for horizon in sorted(config.horizons):
            for baseline in config.baselines:
                one = _compared(pick(rows, world, horizon), world, horizon, config, baseline)
                found += [one] if one else []
    t = holm({i: c.paired.t_p for i, c in enumerate(found)})
    p = holm({i: c.paired.permutation_p for i, c in enumerate(found)})
    return [replace(c, t_holm=t[i], permutation_holm=p[i]) for i, c in enumerate(found)]


def _compared(rows, world, horizon, config, baseline) -> Comparison | None:
    ours = {(r["seed"], r["stream"]) for r in rows if r["method"] == config.learned}
    theirs = {(r["seed"], r["stream"]) for r in rows if r["method"] == baseline}
    both = ours & theirs
    if not both or baseline == config.learned:
        return None
    shared = [r for r in rows if (r["seed"], r["stream"]) in both]
    paired = compare(shared, config.learned, baseline, "avg")
    base = mean(r["avg"] for r in shared if r["method"] == baseline)
    relative = paired.difference / base if base else None
    return Comparison(world, horizon, config.learned, baseline, paired, relative)


def auc(scores: Sequence[float], true: Sequence[bool]) -> float | None:
    """Area under the ROC curve: how often a true module scores above one that is not, ties half.
    None where there are only true or only other ones."""
    yes = [s for s, t in zip(scores, true, strict=True) if t]
    no = [s for s, t in zip(scores, true, strict=True) if not t]
    if not yes or not no:
        return None
    wins = sum((y > n) + 0.5 * (y == n) for y in yes for n in no)
    return wins / (len(yes) * len(no))


def truth_scores(
    result: Mapping[str, Any], truth: Mapping[str, Sequence[str]]
) -> dict[str, float | None]:
    """Tell how well a cell's choices find the modules that the facts were installed in.

    logits_auc: mean over edits of the AUC of the policy's logits (None without a policy).
    choice_auc: the same of its masks. precision, recall: of the masks, means over edits.
    by_group: AUC of the choice frequencies of each relation, mean over relations.
    """
    choices, modules = result["choices"], result["modules"]
    found: dict[str, list[float]] = {k: [] for k in ("logits_auc", "choice_auc", "precision",
                                                     "recall")}  # fmt: skip
    frequency: dict[str, list[list[int]]] = {}
    rows = choices["logits"] or [None] * len(choices["masks"])
    for relation, mask, logits in zip(choices["relations"], choices["masks"], rows, strict=True):
        true = [m in truth[relation] for m in modules]
        chosen = [int(c) for c in mask]
        frequency.setdefault(relation, []).append(chosen)
        if sum(chosen):
            hit = sum(c for c, t in zip(chosen, true, strict=True) if t)
            found["choice_auc"].append(auc(chosen, true))
            found["precision"].append(hit / sum(chosen))
            found["recall"].append(hit / sum(true))
        if logits is not None:
            found["logits_auc"].append(auc(logits, true))
    by_relation = []
    for relation, masks in frequency.items():
        share = [mean(column) for column in zip(*masks, strict=True)]
        by_relation.append(auc(share, [m in truth[relation] for m in modules]))
    scores = {k: mean(v) if v else None for k, v in found.items()}
    return scores | {"by_group": mean(by_relation) if by_relation else None}
