"""The tables and plots of an experiment, made from its cells alone.

cells -> rows, summaries, comparisons -> report.md, report.json, PNG files in the run directory
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hiedit.compare.analysis import (
    Comparison,
    Summary,
    comparisons,
    rows_of,
    summaries,
    truth_scores,
)
from hiedit.compare.cells import read_cell
from hiedit.compare.config import ExperimentConfig
from hiedit.compare.figures import plot_differences, plot_horizons
from hiedit.compare.grid import (
    Chosen,
    choose,
    heterogeneous_setup,
    measure_cells,
    setup_of,
    tuning,
)
from hiedit.compare.oracle import oracle_cells, oracle_report, oracle_table
from hiedit.compare.probing import probe_report
from hiedit.compare.tables import table
from hiedit.compare.worlds import installed_dir
from hiedit.evaluation.report import MISSING, quantity
from hiedit.evaluation.results import plain
from hiedit.plots import short_names
from hiedit.world.heterogeneous import read_heterogeneous

COLUMNS = ("avg", "ES", "GS", "LS", "retention")


def write_report(config: ExperimentConfig, run_dir: str) -> list[Path]:
    """Write and print the report; what is missing is named in it.

    Raises:
        ValueError: if no tuning, or no measurement, is there to report on.
    """
    chosen = choose(config, run_dir)
    rows, missing = rows_of(config, run_dir, chosen)
    if not rows:
        raise ValueError(f"run_dir={run_dir!r}: no cell of this experiment was measured there yet")
    found = summaries(config, rows, chosen)
    tests, tried = comparisons(config, rows), tuning(config, run_dir, chosen)
    truths, recall = _truths(config, run_dir, chosen), _recall(config, run_dir)
    oracle = oracle_report(oracle_cells(config, heterogeneous_setup(config)), run_dir)
    setups = [setup_of(config, world) for world in config.worlds]
    probes, drawn = probe_report(config, setups, run_dir, chosen)
    text = "\n\n".join(
        part
        for part in (
            f"# {config.name}",
            *(_scores(config, world, found) for world in config.worlds),
            _tests(tests),
            _tuning_table(config, tried),
            _truth_table(truths),
            _recall_table(recall),
            oracle_table(oracle),
            probes["text"] if probes else "",
            _missing(missing),
        )
        if part
    )
    out = Path(run_dir)
    (out / "report.md").write_text(text + "\n", encoding="utf-8")
    content = {
        "summaries": [asdict(s) for s in found],
        "comparisons": [asdict(c) for c in tests],
        "tuning": tried,
        "truth": truths,
        "recall": recall,
        "oracle": oracle,
        "probes": probes,
        "missing": missing,
        "rows": rows,
    }
    (out / "report.json").write_text(json.dumps(plain(content), indent=1) + "\n", encoding="utf-8")
    paths = [out / "report.md", out / "report.json", *drawn, *_plots(config, found, tests, out)]
    print(text)
    print("\nwritten:", *paths, sep="\n  ")
    return paths


def _scores(config: ExperimentConfig, world: str, found: Sequence[Summary]) -> str:
    """One table per world: percent, mean ± standard deviation, the 95% interval of the average."""
    own = [s for s in found if s.world == world]
    if not own:
        return ""
    head = [
        "edits", "method", "seeds", "avg", "95% CI", *COLUMNS[1:], "layers / edit",
        "passes / edit", "s / edit", "tuned to",
    ]  # fmt: skip
    lines = []
    for s in own:
        mean, _, low, high = s.values["avg"]
        interval = MISSING if low is None else f"{100 * low:.1f} to {100 * high:.1f}"
        cells = [str(s.horizon), s.method, str(len(s.seeds)), _spread(s, "avg"), interval]
        cells += [_spread(s, m) for m in COLUMNS[1:]]
        cells += [quantity(s.values[c][0]) if c in s.values else MISSING for c in
                  ("layers_per_edit", "passes_per_edit", "seconds_per_edit")]  # fmt: skip
        lines.append([*cells, _setting(s.setting) or MISSING])
    what = "Percent by free generation, exact match; avg is the mean of ES, GS and LS; retention "
    what += f"is avg of the earliest {100 * config.retention_share:.0f}% of the edits, at the end."
    return f"## World: {world}\n\n{what}\n\n{table(head, lines)}"


def _setting(setting: Mapping[str, Any]) -> str:
    """Return what was tuned: numbers, and sets of modules by their short names."""

    def shown(value: Any) -> str:
        if isinstance(value, list):
            return " + ".join(short_names(value))
        return f"{value:g}" if isinstance(value, (int, float)) else str(value)

    return ", ".join(f"{k.rsplit('.', 1)[-1]} {shown(v)}" for k, v in setting.items())


def _tuning_table(config: ExperimentConfig, tried: Sequence[Mapping[str, Any]]) -> str:
    """Every setting that was tried, a method's best first; what was chosen in bold."""
    if not tried:
        return ""
    horizons, lines = sorted(config.horizons), []
    for t in sorted(tried, key=lambda t: (t["world"], t["method"], -sum(t["scores"].values()))):
        cells = [
            MISSING if h not in t["scores"]
            else f"**{100 * t['scores'][h]:.1f}**" if h in t["chosen"]
            else f"{100 * t['scores'][h]:.1f}"
            for h in horizons
        ]  # fmt: skip
        lines.append([t["world"], t["method"], _setting(t["setting"]), *cells])
    head = ["world", "method", "setting", *(f"avg at {h}" for h in horizons)]
    seeds = ", ".join(map(str, config.tuning.seeds))
    what = f"Percent on validation edits, seeds {seeds}; bold: chosen"
    return f"## Tuning\n\n{what}.\n\n{table(head, lines)}"


def _spread(s: Summary, metric: str) -> str:
    if metric not in s.values:
        return MISSING
    mean, sd, *_ = s.values[metric]
    return f"{100 * mean:.1f}" + ("" if sd is None else f" ± {100 * sd:.1f}")


def _tests(tests: Sequence[Comparison]) -> str:
    if not tests:
        return ""
    head = [
        "world", "edits", "comparison", "pairs", "difference", "95% CI", "relative",
        "p (t)", "Holm", "p (permutation)", "Holm", "p (Wilcoxon)",
    ]  # fmt: skip
    lines = []
    for c in tests:
        p = c.paired
        interval = MISSING if p.low is None else f"{100 * p.low:+.1f} to {100 * p.high:+.1f}"
        relative = MISSING if c.relative is None else f"{100 * c.relative:+.2f}%"
        ps = (p.t_p, c.t_holm, p.permutation_p, c.permutation_holm, p.wilcoxon_p)
        lines.append(
            [c.world, str(c.horizon), f"{c.method} - {c.baseline}", str(p.n),
             f"{100 * p.difference:+.1f}", interval, relative, *map(_p, ps)]
        )  # fmt: skip
    what = "Points of avg(ES, GS, LS), paired over seeds and streams; Holm: corrected over all rows"
    return f"## Comparisons\n\n{what}.\n\n{table(head, lines)}"


def _p(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2g}"


def _truths(config: ExperimentConfig, run_dir: str, chosen: Chosen) -> list[dict[str, Any]]:
    """The choices of every measured cell of a world with known truth, scored against it."""
    found = []
    for cell in measure_cells(config, chosen):
        result = read_cell(run_dir, cell) if cell.setup.world == "heterogeneous" else None
        if result is not None and cell.method.updater.kind != "none":
            world = read_heterogeneous(installed_dir(config.heterogeneous, run_dir))
            about = {"method": cell.label, "seed": cell.seed, "edits": cell.horizons[-1]}
            found.append(about | truth_scores(result, world.truth))
    return found


def _truth_table(truths: Sequence[dict[str, Any]]) -> str:
    if not truths:
        return ""
    keys = ("logits_auc", "choice_auc", "by_group", "precision", "recall")
    lines = []
    for label in dict.fromkeys(t["method"] for t in truths):
        own = [t for t in truths if t["method"] == label]
        cells = []
        for key in keys:
            known = [t[key] for t in own if t[key] is not None]
            cells.append(f"{sum(known) / len(known):.3f}" if known else MISSING)
        lines.append([label, str(len(own)), *cells])
    head = ["method", "cells", "AUC of logits", "AUC of masks", "AUC of frequencies by relation",
            "precision", "recall"]  # fmt: skip
    what = "Choices against the modules that each fact was installed in (chance: AUC 0.5)"
    return f"## Heterogeneous world: choices against the truth\n\n{what}.\n\n{table(head, lines)}"


def _recall(config: ExperimentConfig, run_dir: str) -> dict[str, dict[str, float]]:
    if "heterogeneous" not in config.worlds:
        return {}
    path = installed_dir(config.heterogeneous, run_dir) / "heterogeneous.json"
    return json.loads(path.read_text(encoding="utf-8"))["recall"] if path.is_file() else {}


def _recall_table(recall: dict[str, dict[str, float]]) -> str:
    if not recall:
        return ""
    groups = list(recall["nothing"])
    lines = [
        [reset, *(f"{100 * row[g]:.1f}" if g in row else MISSING for g in groups)]
        for reset, row in recall.items()
    ]
    what = "Percent of facts recalled with the layers of one group as they were before installing"
    head = ["reset", *(f"facts: {g}" for g in groups)]
    return f"## Heterogeneous world: where the facts live\n\n{what}.\n\n{table(head, lines)}"


def _missing(missing: Sequence[str]) -> str:
    if not missing:
        return ""
    shown = "\n".join(f"- {line}" for line in missing[:20])
    more = f"\n- and {len(missing) - 20} more" if len(missing) > 20 else ""
    return f"## Not measured yet\n\n{shown}{more}"


def _plots(
    config: ExperimentConfig,
    found: Sequence[Summary],
    tests: Sequence[Comparison],
    out: Path,
) -> list[Path]:
    paths = []
    for world in config.worlds:
        try:
            figures = {
                "by_edits": plot_horizons([s for s in found if s.world == world]),
                "differences": plot_differences([c for c in tests if c.world == world]),
            }
        except ImportError as error:
            print(f"No plots: {error}")
            return paths
        for name, figure in figures.items():
            if figure is not None:
                paths.append(out / f"{world}_{name}.png")
                figure.savefig(paths[-1], dpi=150)
    return paths
