"""Progress on the terminal: one line per method with stage, rate and remaining time.

With Rich and a terminal these are bars; elsewhere a plain line every ten seconds per method.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Update:
    """The state of one method: ``done`` of ``total`` edits (or another ``unit``) in ``stage``;
    ``note`` in words."""

    method: str
    stage: str
    done: int = 0
    total: int | None = None
    note: str = ""
    unit: str = "edits"


class Progress:
    """A context manager that shows ``Update``s."""

    def __init__(self):
        self._bar, self._tasks, self._began, self._said = None, {}, {}, {}

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            try:
                self._bar = _rich_bar()
                self._bar.start()
            except ImportError:
                pass
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, update: Update) -> None:
        """Draw ``update``; a new stage of a method begins a new line or bar."""
        key, now = (update.method, update.stage), time.perf_counter()
        if key not in self._began:
            self._began[key] = self._said[key] = now
            if self._bar is None:
                _line(f"{update.method}: {update.stage}")
            else:
                self._replace(update)
        if self._bar is not None:
            self._bar.update(
                self._tasks[update.method],
                completed=update.done,
                total=update.total,
                note=update.note,
            )
        elif (
            update.total
            and update.stage != "done"
            and update.done
            and (now - self._said[key] > 10 or update.done == update.total)
        ):
            self._said[key] = now
            spent = max(now - self._began[key], 1e-9)
            rate = update.done / spent
            left = ((update.total or update.done) - update.done) / rate
            _line(
                f"{update.method}: {update.stage} {update.done}/{update.total}  "
                f"{rate:.1f} {update.unit}/s  {left:.0f} s left  {update.note}".rstrip()
            )

    def _replace(self, update: Update) -> None:
        if update.method in self._tasks:
            self._bar.remove_task(self._tasks[update.method])
        label = f"{update.method}: {update.stage}"
        self._tasks[update.method] = self._bar.add_task(
            label, total=None, note="", unit=update.unit
        )


def _line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _rich_bar():
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task):
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.1f} {task.fields['unit']}/s")

    return Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=Console(stderr=True),
        transient=True,
    )
