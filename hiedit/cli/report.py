"""Reports of what became of `hiedit edit`'s rows: acknowledgements for programs, a report for
people."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from pathlib import Path

import typer

from hiedit.cli.requests import Row
from hiedit.cli.shared import counted, note, ranges
from hiedit.edited import COMMITTED, PREDICTED, REJECTED, SKIPPED, Edited
from hiedit.editor import Editor

INVALID = "invalid"
LISTED = 20  # rows that are all listed; of more, only those that were not plainly committed


def acknowledgement(row: Row, done: Edited | None) -> str:
    """One line of JSON; ``done`` is None for a malformed row."""
    if done is None:
        about = {"status": INVALID, "id": None, "success": None, "kl": None, "drift": None,
                 "scale": 1.0, "layers": 0, "passes": 0, "reasons": row.problems,
                 "conflicts": ()}  # fmt: skip
    else:
        about = {
            "status": done.status, "id": done.id, "success": _finite(done.success),
            "kl": _finite(done.kl), "drift": _finite(done.drift), "scale": done.scale,
            "layers": len(done.layers), "passes": done.passes, "reasons": done.reasons,
            "conflicts": done.conflicts,
        }  # fmt: skip
    return json.dumps({"line": row.line} | about, ensure_ascii=False)


class Report:
    """Collects what became of the rows; ``as_json`` acknowledges each on stdout at once."""

    def __init__(self, ledger: Path, as_json: bool, skip_bad_rows: bool):
        self.ledger, self.as_json, self._skip_bad_rows = ledger, as_json, skip_bad_rows
        self.counts: Counter[str] = Counter()
        self.objected = 0  # of a dry run: predictions that break a limit
        self.halved = 0
        self._budget: tuple[float, float] | None = None  # used, in all
        self._ids: list[int] = []
        self._successes: list[float] = []
        self._lines: list[str] = []
        self._noteworthy: list[str] = []

    def add(self, row: Row, done: Edited | None, editor: Editor) -> None:
        """``done`` is None for a malformed row."""
        status = INVALID if done is None else done.status
        self.counts[status] += 1
        if done is not None:
            self.objected += status == PREDICTED and bool(done.reasons)
            self._ids += [done.id] if status == COMMITTED else []
            self.halved += status in (COMMITTED, PREDICTED) and done.scale < 1
            if done.success is not None and status in (COMMITTED, PREDICTED):
                self._successes.append(done.success)
        limit, used = editor.guard.max_drift, editor.drift
        self._budget = None if limit is None or used is None else (used, limit)
        if self.as_json:
            typer.echo(acknowledgement(row, done))
            return
        warnings = _warnings(done, editor, self.ledger)
        lines = [_line(row, done), *warnings]
        if len(self._lines) <= 2 * LISTED:
            self._lines += lines
        if warnings or done is None or done.reasons:
            self._noteworthy += lines

    @property
    def status(self) -> int:
        """Exit status: 1 if a row was malformed (and not to be skipped) or broke a limit."""
        bad = self.counts[REJECTED] + self.objected
        return int(bool(bad or (self.counts[INVALID] and not self._skip_bad_rows)))

    def close(self) -> None:
        """The report for people, also of what was done before something went wrong."""
        few = self.counts.total() <= LISTED
        for line in self._lines if few else self._noteworthy:
            typer.echo(line)
        (note if self.as_json else typer.echo)(self.summary())

    def summary(self) -> str:
        """One paragraph: how many of each, how well, where, how to take them back, and what is left
        of the budget."""
        kinds = [COMMITTED, SKIPPED, REJECTED] if not self.counts[PREDICTED] else [PREDICTED]
        kinds += [k for k in (SKIPPED, REJECTED, INVALID) if self.counts[k] and k not in kinds]
        parts = [", ".join(f"{self.counts[kind]} {kind}" for kind in kinds)]
        if self.halved:
            parts.append(f"{self.halved} made smaller to keep the bounds")
        if self.objected:
            parts.append(f"{self.objected} of them would be rejected")
        if self._successes:
            parts.append(f"mean success {sum(self._successes) / len(self._successes):.2f}")
        if self._ids:
            parts.append(f"ledger {self.ledger}")
        text = "; ".join(parts)
        if self._ids:
            text += f"\ntake back with: hiedit revert {ranges(self._ids)} {_ledger(self.ledger)}"
        elif self.counts[PREDICTED]:
            text += "; nothing was committed"
        if self._budget:
            used, limit = self._budget
            text += (
                f"\nbudget: drift {used:.3g} from the base model on watched prompts, of "
                f"--max-drift {limit:g}" + (f" ({used / limit:.0%})" if limit else "")
            )
        return text


def _line(row: Row, done: Edited | None) -> str:
    if done is None:
        return f"{INVALID:<10}line {row.line}: {'; '.join(row.problems)}"
    what = f"{done.request.prompt!r} -> {done.request.target!r}"
    where = "" if done.id is None else f"edit {done.id}"
    if done.status == SKIPPED:
        return f"{done.status:<10}{what}: {'; '.join(done.reasons)} ({where})"
    found = [where] if where else []
    if done.success is not None:
        found.append(f"success {done.success:.2f}")
    if done.kl is not None:
        found.append(f"KL {done.kl:.1e}")
    if done.scale < 1:
        found.append(f"{done.scale:g} of its size")
    if done.layers:
        found.append(f"{counted(len(done.layers), 'layer')}")
    if done.passes:
        found.append(f"{done.passes} pass{'es' * (done.passes != 1)}")
    line = f"{done.status:<10}{what}: {', '.join(found)}"
    if not done.reasons:
        return line
    word = "would be rejected" if done.status == PREDICTED else "because"
    return f"{line}; {word}: {'; '.join(done.reasons)}"


def _warnings(done: Edited | None, editor: Editor, ledger: Path) -> list[str]:
    """Warn of a request that contradicts earlier ones."""
    if done is None or not done.conflicts:
        return []
    earlier = editor.ledger.record(done.conflicts[-1])
    return [
        f"  warning: edit {earlier.id} gave this prompt another answer, "
        f"{earlier.request.target!r}; both stay in the ledger and the later one counts; "
        f"to take the earlier one out: hiedit revert {earlier.id} {_ledger(ledger)}"
    ]


def _ledger(ledger: Path) -> str:
    return f"--ledger {shlex.quote(str(ledger))}"


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
