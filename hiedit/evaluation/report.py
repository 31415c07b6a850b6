"""The table that ends a run, and a few edits in words. Rich where installed, plain text otherwise.

Scores are percentages with one decimal here (fractions everywhere else). One row per method; over
several seeds a row shows the means with their standard deviations below.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hiedit.evaluation.results import METRICS, Example, MethodResult, Scores, number
from hiedit.evaluation.words import match

MISSING = "–"
LEGEND = (
    "ES  efficacy: edited prompts answered with the new answer",
    "GS  generalisation: the same asked in a phrasing that no edit used",
    "LS  locality: unrelated prompts answered as before all edits, as far as the gold answer goes",
    "retention: ES GS LS of the earliest edits{retained}, measured after the whole stream",
    "Percent of prompts; free greedy generation must begin with the answer, at a word boundary; "
    "teacher-forced: percent of answer tokens. Formulas and sources: docs/metrics.md.",
)


@dataclass(frozen=True)
class Cell:
    """Parts shown side by side, each a (text, sd text, style) with style "", "bold" or "dim"."""

    parts: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Column:
    """One column: title, a sub-title for its parts, whether it tells of cost, its cells."""

    title: str
    parts: str
    cost: bool
    cells: tuple[Cell, ...]


def report(results: Sequence[MethodResult], examples: int = 3, console: Any = None) -> None:
    """Print the table, the legend and ``examples`` edits of the best method.

    ``console`` is a ``rich.console.Console``, or None for standard output.
    """
    if not results:
        raise ValueError("there are no results to report")
    chosen = best_with_examples(results)
    try:
        from rich.console import Console
    except ImportError:
        print(plain_table(results))
        print("\n".join(legend(results)))
        if chosen and examples:
            print("\n".join(example_lines(chosen, examples)))
        print("\n".join(everyday_lines(results)))
        return
    if console is None:
        # a log file has no width of its own: do not let Rich assume 80
        console = Console(width=None if sys.stdout.isatty() else 160)
    for table in rich_tables(results, console):
        console.print(table)
        console.print()
    for line in legend(results):
        console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
    console.print()
    edits = example_lines(chosen, examples) if chosen and examples else []
    for lines in (edits, everyday_lines(results)):
        for index, line in enumerate(lines):
            style = "bold" if index == 0 else ""
            console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def table_columns(results: Sequence[MethodResult]) -> list[Column]:
    """The table's content, without any drawing; the first column holds the methods' names.

    A first row "before editing" is added unless a control that edits nothing is among them.
    """
    groups = group_by_method(results)
    first = next(iter(groups.values()))  # the unedited model is the same for every method
    before = None if any(r.is_control for r in results) else [r.before for r in first]
    uneven = len({len(g) for g in groups.values()}) > 1  # else the legend gives the number once
    names = [f"{m} ({len(g)} seeds)" if uneven else m for m, g in groups.items()]
    names = (["before editing"] if before else []) + names

    def scores(title: str, pick: Callable[[MethodResult], Scores], keys, base=None, dim=False):
        values = [[[getattr(pick(r), k) for r in g] for k in keys] for g in groups.values()]
        contest = [not g[0].is_control for g in groups.values()]
        cells = _cells(values, contest, percent, style="dim" if dim else "")
        if before:
            row = [[getattr(s, k) for s in before] if base else [None] for k in keys]
            cells = _cells([row], [False], percent, style="dim") + cells
        return Column(title, " ".join(k[:2] for k in keys if len(keys) > 1), False, tuple(cells))

    def cost(title: str, name: str):
        values = [[[getattr(r, name) for r in g]] for g in groups.values()]
        if before:
            values = [[[None]], *values]
        return Column(title, "", True, tuple(_cells(values, [False] * len(values), quantity)))

    forced = tuple(f"{name}_tf" for name in METRICS)
    return [
        Column("method", "", False, tuple(Cell(((name, "", ""),)) for name in names)),
        *(scores(name, lambda r: r.scores, (name,), base=True) for name in METRICS),
        scores("retention", lambda r: r.retention, METRICS),
        scores("teacher-forced", lambda r: r.scores, forced, base=True, dim=True),
        cost("layers /edit", "layers_per_edit"),
        cost("passes /edit", "passes_per_edit"),
        cost("s/edit", "seconds_per_edit"),
        cost("train s", "train_seconds"),
    ]


def _cells(values, contest: Sequence[bool], show, style: str = "") -> list[Cell]:
    """Cells of one column from values [method][part][seed]; the best of the contest is bold."""
    means = [[_mean(seeds) for seeds in row] for row in values]
    best = []
    for part in range(len(values[0])):
        rivals = [m[part] for m, c in zip(means, contest, strict=True) if c and m[part] is not None]
        best.append(max(rivals) if len(rivals) > 1 else None)
    cells = []
    for row, row_means, competes in zip(values, means, contest, strict=True):
        parts = []
        for seeds, value, top in zip(row, row_means, best, strict=True):
            # ties in what is shown are ties, whatever the digits behind it
            wins = competes and top is not None and show(value) == show(top)
            spread = _sd(seeds)
            hidden = spread is None or (spread == 0 and show is quantity)
            weight = "bold" if wins and not style else style
            parts.append((show(value), "" if hidden else f"±{show(spread)}", weight))
        cells.append(Cell(tuple(parts)))
    return cells


def rich_tables(results: Sequence[MethodResult], console: Any) -> list[Any]:
    """The table for Rich; two, scores and costs, where ``console`` is too narrow for it."""
    columns = table_columns(results)
    whole = _rich_table(columns)
    if console.measure(whole, options=console.options.update(width=1000)).maximum <= console.width:
        return [whole]
    costs = [columns[0], *(c for c in columns if c.cost)]
    return [_rich_table([c for c in columns if not c.cost]), _rich_table(costs)]


def _rich_table(columns: Sequence[Column]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def text(cell: Sequence[Sequence[tuple[str, str]]]) -> Text:
        lines = [Text(" ").join(Text(part, style) for part, style in line) for line in cell]
        return Text("\n").join(lines)

    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True, show_edge=False
    )
    drawn = [_lines(column) for column in columns]
    for index, (column, (head, _)) in enumerate(zip(columns, drawn, strict=True)):
        title = "\n".join([*column.title.split(), *([head] if column.parts else [])])
        table.add_column(title, justify="right" if index else "left", no_wrap=True)
    for cells in zip(*(body for _, body in drawn), strict=True):
        table.add_row(*map(text, cells))
    return table


def plain_table(results: Sequence[MethodResult]) -> str:
    """The table as text for where Rich is missing; the best values are marked by ``*``."""
    columns = table_columns(results)
    drawn = [_lines(column) for column in columns]
    lines = [[c.title for c in columns], [head for head, _ in drawn]]
    for cells in zip(*(body for _, body in drawn), strict=True):
        for level in range(max(map(len, cells))):
            parts = [cell[level] if level < len(cell) else [] for cell in cells]
            lines.append(
                [" ".join(text + ("*" if s == "bold" else " ") for text, s in p) for p in parts]
            )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        text.append("  ".join(cells).rstrip())
    text.insert(2, "-" * max(map(len, text)))
    return "\n".join(text)


def markdown_table(results: Sequence[MethodResult]) -> str:
    """The table in Markdown, a spread behind its mean."""

    def show(cell: Cell) -> str:
        return " / ".join(f"{value} {spread}".rstrip() for value, spread, _ in cell.parts)

    columns = table_columns(results)
    lines = [[f"{c.title} {c.parts.replace(' ', ' / ')}".rstrip() for c in columns]]
    lines.append(["---"] + ["--:"] * (len(columns) - 1))
    lines += [[show(cell) for cell in row] for row in zip(*(c.cells for c in columns), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _lines(column: Column) -> tuple[str, list[list[list[tuple[str, str]]]]]:
    """The aligned heading of the parts, and per cell its lines of (text, style) parts."""
    heads = column.parts.split() or [""] * len(column.cells[0].parts)
    widths = [len(head) for head in heads]
    for cell in column.cells:
        for i, (value, spread, _) in enumerate(cell.parts):
            widths[i] = max(widths[i], len(value), len(spread))
    align = str.ljust if column.title == "method" else str.rjust
    body = []
    for cell in column.cells:
        values = [(align(v, w), s) for (v, _, s), w in zip(cell.parts, widths, strict=True)]
        spreads = [(align(d, w), "dim") for (_, d, _), w in zip(cell.parts, widths, strict=True)]
        body.append([values, spreads] if any(d for _, d, _ in cell.parts) else [values])
    return " ".join(align(h, w) for h, w in zip(heads, widths, strict=True)), body


def legend(results: Sequence[MethodResult]) -> list[str]:
    """Return what the columns mean, in words."""
    counts = {r.retention_edits for r in results if r.retention_edits}
    retained = f" (the first {counts.pop()})" if len(counts) == 1 else ""
    lines = [line.format(retained=retained) for line in LEGEND]
    lengths = ", ".join(str(n) for n in sorted({r.edits for r in results}))
    seeds = {len(group) for group in group_by_method(results).values()}
    if seeds != {1}:
        lines.append(f"Mean over {min(seeds)} to {max(seeds)} seeds, ± standard deviation.")
        lines[-1] = lines[-1].replace(f"{min(seeds)} to {min(seeds)}", str(min(seeds)))
    lines.append(f"Stream: {lengths} edits, one after another, weights never reset.")
    return [*lines, *_superseded(results), *_beside(results)]


def _superseded(results: Sequence[MethodResult]) -> list[str]:
    """Tell how the edits fare that no later one contradicts, where some are contradicted."""
    told = [r for r in results if r.standing is not None and not r.is_control]
    if not told:
        return []
    counts = {r.superseded for r in told}
    many = str(counts.pop()) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    lines = [
        f"A later edit of the same fact gives {many} of them another answer. The others alone:"
    ]
    for result in told:
        forced, free = (
            ", ".join(f"{k[:2]} {percent(getattr(result.standing, k))}" for k in keys)
            for keys in (("ES_tf", "GS_tf"), METRICS)
        )
        lines.append(f"  {result.method}: {free}; teacher-forced {forced}")
    return lines


def _beside(results: Sequence[MethodResult]) -> list[str]:
    """Return what real models are measured by as well: edits kept out, plain text read."""
    guarded = [r for r in results if r.rejected is not None and not r.is_control]
    if not guarded:
        return []
    kept = ", ".join(f"{r.method} {r.rejected}" for r in guarded)
    read = [r for r in results if r.perplexity_after is not None]
    lines = [f"Edits that the guard kept out (they count as failed): {kept}"]
    if read and read[0].perplexity_before is not None:
        now = ", ".join(f"{r.method} {r.perplexity_after:.2f}" for r in read if not r.is_control)
        before = read[0].perplexity_before
        lines.append(f"Perplexity on plain text, {before:.2f} before editing: {now}")
    return lines


def best_with_examples(results: Sequence[MethodResult]) -> MethodResult | None:
    """The result with the highest mean of ES, GS and LS among those with examples."""
    candidates = [r for r in results if r.examples and not r.is_control]
    return max(candidates, key=lambda r: r.scores.mean() or 0.0, default=None)


def example_lines(result: MethodResult, limit: int = 3) -> list[str]:
    """A heading and ``limit`` edits of ``result`` in words, before and after."""
    lines = [f"Edits by {result.method}, before → after all {result.edits} edits:"]
    for example in result.examples[:limit]:
        lines += [f"  {line}" for line in _example(example)]
    return lines


def everyday_lines(results: Sequence[MethodResult]) -> list[str]:
    """A heading, and what each method's edits make of prompts that have nothing to do with them."""
    edited = [r for r in results if r.everyday and not r.is_control]
    if not edited:
        return []
    width = max(len(r.method) for r in edited)
    lines = ["Prompts that have nothing to do with the edits, before, and after all of them by:"]
    for said in zip(*(r.everyday for r in edited), strict=True):
        lines.append(f"  {_ask(said[0].prompt)} {quote(said[0].before)}")
        for result, one in zip(edited, said, strict=True):
            same = _same(one.before, one.after)
            lines.append(f"    {result.method:{width}}  {'the same' if same else quote(one.after)}")
    return lines


def _example(e: Example) -> Iterable[str]:
    wish = "" if match(e.after or "", e.target).begins else f"   ✗ wanted {quote(e.target)}"
    yield f"{_ask(e.prompt)} {quote(e.before or e.old)} → {quote(e.after)}{wish}"
    if e.heldout_prompt is not None:
        sign = "" if match(e.heldout_after or "", e.target).begins else "   ✗"
        yield f"    held-out phrasing   {_ask(e.heldout_prompt)} {quote(e.heldout_after)}{sign}"
    if e.locality_prompt is not None:
        same = _same(e.locality_before, e.locality_after)
        kept = same if e.locality_kept is None else e.locality_kept
        change = "unchanged" if same else f"→ {quote(e.locality_after)}"
        answer = quote(e.locality_before)
        sign = "" if kept else "   ✗"
        yield f"    unrelated           {_ask(e.locality_prompt)} {answer} {change}{sign}"


def _ask(prompt: str | None) -> str:
    text = clean(prompt)
    return text if text.endswith((":", "?")) else f"{text}:"


def _same(a: str | None, b: str | None) -> bool:
    return (a or "").strip() == (b or "").strip()


def clean(text: str | None, limit: int = 100) -> str:
    """``text`` on one line, without control characters, of at most ``limit`` characters."""
    line = re.sub(r"\s+", " ", text or "").strip()
    line = "".join(c if c.isprintable() else "�" for c in line)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def quote(text: str | None) -> str:
    return f'"{clean(text, 60)}"'


def group_by_method(results: Iterable[MethodResult]) -> dict[str, list[MethodResult]]:
    """Results by method in order of appearance; lengths are told apart where there are several."""
    results = list(results)
    several = len({r.edits for r in results}) > 1
    groups: dict[str, list[MethodResult]] = {}
    for result in results:
        name = f"{result.method}, {result.edits} edits" if several else result.method
        groups.setdefault(name, []).append(result)
    return groups


def percent(value: float | None) -> str:
    """A fraction as a percentage with one decimal."""
    return MISSING if value is None else f"{100 * value:.1f}"


def quantity(value: float | None) -> str:
    """A number of layers, passes or seconds with about three significant digits."""
    if value is None:
        return MISSING
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _known(values: Iterable[float | None]) -> list[float]:
    return [v for v in map(number, values) if v is not None]


def _mean(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return statistics.fmean(known) if known else None


def _sd(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return statistics.stdev(known) if len(known) > 1 else None
