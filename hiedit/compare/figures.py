"""Plots of an experiment: scores over the stream's length, differences, relations by modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hiedit.compare.analysis import Comparison, Summary
from hiedit.plots import COLOURS, MARKERS, new_figure, short_names, tidy


def plot_horizons(found: Sequence[Summary]) -> Any:
    """avg(ES, GS, LS) with its 95% interval and retention over the number of edits, by method."""
    if not found:
        return None
    figure = new_figure(10.0, 4.2)
    labels = list(dict.fromkeys(s.method for s in found))
    for place, (metric, title) in enumerate((("avg", "average of ES, GS, LS"),
                                             ("retention", "retention"))):  # fmt: skip
        axes = figure.add_subplot(1, 2, place + 1)
        for index, label in enumerate(labels):
            own = [s for s in found if s.method == label and metric in s.values]
            xs = [s.horizon for s in own]
            ys = [100 * s.values[metric][0] for s in own]
            bars = [100 * ((s.values[metric][3] or s.values[metric][0]) - s.values[metric][0])
                    for s in own]  # fmt: skip
            axes.errorbar(
                xs, ys, bars, label=label, capsize=3, linewidth=1.5, markersize=4,
                color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)],
                linestyle=("-", "--", "-.")[index // len(COLOURS) % 3],
            )  # fmt: skip
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("edits")
        axes.set_ylabel("percent")
        tidy(axes)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False)
    return figure


def plot_differences(tests: Sequence[Comparison]) -> Any:
    """The learned method less each baseline in points of avg, with the paired 95% intervals: a row
    for each baseline, a mark in it for each stream length."""
    if not tests:
        return None
    baselines = list(dict.fromkeys(c.baseline for c in tests))
    horizons = sorted({c.horizon for c in tests})
    figure = new_figure(7.0, 1.3 + 0.34 * len(baselines) * max(1.0, 0.5 * len(horizons)))
    axes = figure.add_subplot()
    axes.axvline(0, color="black", linewidth=1)
    for index, horizon in enumerate(horizons):
        own = [c for c in tests if c.horizon == horizon]
        lift = 0.6 * ((index + 0.5) / len(horizons) - 0.5)
        middle = [100 * c.paired.difference for c in own]
        reach = [0.0 if c.paired.high is None else 100 * c.paired.high - m
                 for c, m in zip(own, middle, strict=True)]  # fmt: skip
        axes.errorbar(
            middle, [baselines.index(c.baseline) + lift for c in own], xerr=reach, capsize=3,
            color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)],
            linestyle="", markersize=4, label=f"{horizon:,} edits",
        )  # fmt: skip
    axes.set_yticks(range(len(baselines)), baselines, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("points of the average of ES, GS, LS, paired, 95% interval")
    axes.set_title(f"{tests[0].method} less each baseline", loc="left", fontsize=10)
    tidy(axes)
    axes.grid(axis="x", color="#E3E3E3", linewidth=0.8)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return figure


def plot_heat(panels: Mapping[str, Mapping[str, Sequence[float]]], modules: Sequence[str]) -> Any:
    """One panel per quantity, relations by modules; each row scaled to its own range, because a
    rank correlation looks at nothing else."""
    figure = new_figure(3.6 * len(panels) + 1.5, 1.6 + 0.35 * max(map(len, panels.values())))
    for place, (title, rows) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), place + 1)
        scaled = []
        for values in rows.values():
            low, high = min(values), max(values)
            scaled.append([(v - low) / (high - low) if high > low else 0.5 for v in values])
        axes.imshow(scaled, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(modules)), short_names(modules), rotation=90, fontsize=7)
        names = list(rows) if place == 0 else [""] * len(rows)
        axes.set_yticks(range(len(rows)), names, fontsize=8)
        axes.set_title(title, loc="left", fontsize=10)
    return figure
