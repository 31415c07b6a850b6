"""Cells: what one measurement is, its key, and the file that holds its result."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hiedit.compare.config import HeterogeneousConfig
from hiedit.config import MethodConfig, TrainConfig
from hiedit.durable import write_text
from hiedit.evaluation.results import plain
from hiedit.provenance import digest
from hiedit.runconfig import ModelConfig

FORMAT = 1  # of a cell's result and of what leads to it: a change runs all cells again


@dataclass(frozen=True)
class Setup:
    """The settings that all cells of one world share. world: ``world`` or ``heterogeneous``."""

    world: str
    model: ModelConfig
    heterogeneous: HeterogeneousConfig
    train: TrainConfig
    retention_share: float
    batch: int

    def determined_by(self) -> dict[str, Any]:
        """Everything that changes a number: the unused world's settings do not."""
        values = dataclasses.asdict(self)
        if self.world != "heterogeneous":
            del values["heterogeneous"]
        return values


@dataclass(frozen=True)
class Cell:
    """One method with one setting, trained with ``seed`` and measured on the stream of ``seed``.

    phase: ``tune`` streams validation edits, ``measure``, ``probe`` and ``oracle`` test edits.
    horizons: the points of the stream at which it is measured, ascending; it ends at the last.
    extra: of a probe, its settings; ``relations`` restricts the stream to these.
    """

    setup: Setup
    phase: str
    seed: int
    horizons: tuple[int, ...]
    method: MethodConfig
    extra: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        return self.method.name

    @property
    def learned(self) -> bool:
        return self.method.trains

    @property
    def edits(self) -> int:
        """Tell how much work it is, in edits."""
        trained = self.setup.train.edits if self.learned else 0
        return self.horizons[-1] + trained

    def determined_by(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "setup": self.setup.determined_by(),
            "phase": self.phase,
            "seed": self.seed,
            "horizons": list(self.horizons),
            "method": _unnamed(self.method),
            "extra": dict(self.extra),
        }

    @property
    def key(self) -> str:
        """16 hex digits of everything that determines the result; the label does not."""
        return digest(json.dumps(self.determined_by(), sort_keys=True))[:16]

    @property
    def editor_key(self) -> str:
        """The same of everything that determines the trained editor: cells may share one."""
        setup = self.setup.determined_by()
        del setup["retention_share"], setup["batch"]
        parts = {"format": FORMAT, "setup": setup, "seed": self.seed}
        return digest(json.dumps(parts | {"method": _unnamed(self.method)}, sort_keys=True))[:16]

    def describe(self) -> str:
        at = "+".join(map(str, self.horizons))
        return f"{self.setup.world} {self.label} {self.phase} {at} edits, seed {self.seed}"


def _unnamed(method: MethodConfig) -> dict[str, Any]:
    values = dataclasses.asdict(method)
    del values["name"]
    return values


def cell_path(run_dir: str | Path, cell: Cell) -> Path:
    return Path(run_dir) / "cells" / f"{cell.key}.json"


def read_cell(run_dir: str | Path, cell: Cell) -> dict[str, Any] | None:
    """The cell's result; None where it was not run, or what is there is not its result."""
    try:
        found = json.loads(cell_path(run_dir, cell).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(found, dict) and found.get("cell") == plain(cell.determined_by())
    return found["result"] if same and "result" in found else None


def write_cell(run_dir: str | Path, cell: Cell, result: dict[str, Any]) -> Path:
    """Put the cell's result into its file, whole or not at all."""
    content = {"label": cell.label, "cell": plain(cell.determined_by()), "result": plain(result)}
    text = json.dumps(content, allow_nan=False) + "\n"
    return write_text(cell_path(run_dir, cell), text)
