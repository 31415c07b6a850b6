"""The best place of an edit, measured: it need not be where its fact was installed.

Each group's test facts are edited in the modules of each group in turn, by one training-free
method; a stream of both is also edited with the truth known edit by edit, which is what a perfect
policy would do. If the diagonal is not the best of its row, knowing the truth is of no use to an
editor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hiedit.catalogue import load_method
from hiedit.compare.cells import Cell, Setup, read_cell
from hiedit.compare.config import ExperimentConfig, apply
from hiedit.compare.tables import table
from hiedit.evaluation.statistics import mean
from hiedit.types import Action, Signals
from hiedit.world.fictional import GROUPS
from hiedit.world.heterogeneous import modules_of

MIXED, TRUTH = "both, mixed", "its own layers"


def sites() -> dict[str, list[str] | None]:
    """Return, by name, the modules to edit in; None: all editable ones."""
    found: dict[str, list[str] | None] = {g.name: modules_of(g) for g in GROUPS}
    return found | {"both": [m for g in GROUPS for m in modules_of(g)], "all": None}


class TruthSelector(nn.Module):
    """A selector in place of a method's: the modules that the fact of the current edit was
    installed in. ``relation`` is set before every edit."""

    learned = False

    def __init__(self, selector: nn.Module, truth: Mapping[str, Sequence[str]]):
        super().__init__()
        self.config, self.relation = selector.config, None
        self._masks = {
            relation: torch.tensor([[float(name in modules) for name in selector.names]])
            for relation, modules in truth.items()
        }

    def forward(self, signals: Signals, explore: bool = False, gains=None) -> Action:
        mask = self._masks[self.relation].to(signals.loss.device)
        return Action(mask.expand(len(signals.loss), -1))

    def observe(self, signals: Signals) -> None:
        """Nothing is learned."""

    def reset(self) -> None:
        """Nothing is remembered."""

    def again(self, signals: Signals, action: Action) -> Action:
        """The choice holds for all passes of an edit."""
        return action


def oracle_cells(
    config: ExperimentConfig, setup: Setup | None
) -> dict[tuple[str, str], list[Cell]]:
    """Return, by (group, site), the cells of all step sizes and seeds; none without such a
    world."""
    o = config.oracle
    if not o.edits or setup is None:
        return {}
    found: dict[tuple[str, str], list[Cell]] = {}
    groups: dict[str, tuple[str, ...]] = {g.name: g.relations for g in GROUPS}
    for group, relations in (groups | {MIXED: sum(groups.values(), ())}).items():
        for site, modules in (sites() | ({TRUTH: None} if group == MIXED else {})).items():
            chosen: dict[str, Any] = {"selector.kind": "all"}
            if modules is not None:
                chosen = {"selector.kind": "static", "selector.modules": modules}
            for eta in o.etas:
                method = apply(load_method(o.method), chosen | {"updater.eta": eta}, "oracle")
                extra = (("relations", relations), ("truth", site == TRUTH))
                found.setdefault((group, site), []).extend(
                    Cell(setup, "oracle", seed, (o.edits,), method, extra) for seed in o.seeds
                )
    return found


def oracle_report(cells: Mapping[tuple[str, str], list[Cell]], run_dir: str) -> list[dict]:
    """Return, by group and site, the scores (means over seeds) at the step size with the best
    average."""
    found = []
    for (group, site), own in cells.items():
        by_eta: dict[float, list[dict]] = {}
        for cell in own:
            result = read_cell(run_dir, cell)
            if result is not None:
                by_eta.setdefault(cell.method.updater.eta, []).append(result["points"][0])
        rows = [
            {"group": group, "site": site, "eta": eta, "seeds": len(points)} | _means(points)
            for eta, points in by_eta.items()
        ]
        if rows:
            found.append(max(rows, key=lambda r: r["avg"]))
    return found


def _means(points: list[dict]) -> dict[str, float]:
    scores = {m: mean(p["scores"][m] for p in points) for m in ("ES", "GS", "LS")}
    return scores | {"avg": mean(scores.values()), "passes": mean(p["passes_per_edit"]
                                                                for p in points)}  # fmt: skip


def oracle_table(rows: list[dict]) -> str:
    if not rows:
        return ""
    lines = [
        [r["group"], r["site"], *(f"{100 * r[m]:.1f}" for m in ("avg", "ES", "GS", "LS")),
         f"{r['passes']:.1f}", f"{r['eta']:g}", str(r["seeds"])]
        for r in rows
    ]  # fmt: skip
    head = ["facts of", "edited in", "avg", "ES", "GS", "LS", "passes / edit", "best step", "seeds"]
    what = "Facts of one group, or of both in one stream, edited in the modules of one group, each "
    what += "with its best step size (chosen on these same edits, for every site alike)"
    return f"## Heterogeneous world: does it matter where an edit goes?\n\n{what}.\n\n" + table(
        head, lines
    )
