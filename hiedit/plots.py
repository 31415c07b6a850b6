"""Plots of an evaluation, as PNG files: curves, ages, layers, methods side by side, training.

Drawn with Matplotlib's object interface and the Agg canvas: no window, no global state, and the
backend of whoever imports this stays as it was. Colours are Okabe and Ito's, which colour-blind
readers can tell apart; every line also has a marker of its own.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from hiedit.evaluation.report import group_by_method
from hiedit.evaluation.results import METRICS, MethodResult, Scores, number

DPI = 150
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A800")
MARKERS = "osD^vPX*"
CONTROL = "#8C8C8C"
NAMES = {"ES": "efficacy (ES)", "GS": "generalisation (GS)", "LS": "locality (LS)"}
ANNOTATED = 200  # a heat map of more cells than this has no numbers in it

X_KEYS = ("edit", "edits", "step")  # where a training record says how far training was
NO_PANEL = (*X_KEYS, "stream", "seconds")

History = Sequence[Mapping[str, float] | Any]


def save_plots(
    results: Sequence[MethodResult],
    out_dir: str | Path,
    training: Mapping[str, History] | History | None = None,
) -> list[Path]:
    """Draw every plot for which there is data into ``out_dir``; their paths, in that order.

    training: records of training by method (or of one method): ``TrainStep``s, or mappings with
        ``edits`` (or ``step``); a panel is drawn for each of their numbers.

    Raises:
        ImportError: if Matplotlib is not installed, with the remedy.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    if training is not None and not isinstance(training, Mapping):
        training = {"training": training}
    drawn = [
        ("method_comparison.png", plot_methods(results)),
        ("retention_curve.png", plot_curve(results)),
        ("retention_by_age.png", plot_by_age(results)),
        ("layer_selection.png", plot_layers(results)),
        ("training_curve.png", plot_training(training or {})),
    ]
    paths = []
    for name, figure in drawn:
        if figure is not None:
            figure.savefig(out_dir / name, dpi=DPI)
            paths.append(out_dir / name)
    return paths


def plot_curve(results: Sequence[MethodResult]) -> Any:
    """ES, GS and LS over the number of edits, one panel each, one line per method."""
    points = {
        name: [{p.edits: p.scores for p in r.curve} for r in group if r.curve]
        for name, group in group_by_method(results).items()
    }
    return _three_panels(
        results, points, "edits applied", "Scores over all edits so far, as the stream goes on"
    )


def plot_by_age(results: Sequence[MethodResult]) -> Any:
    """Scores after the whole stream over the age of the edit: what is forgotten."""
    points = {
        name: [dict(r.by_age) for r in group if r.by_age]
        for name, group in group_by_method(results).items()
    }
    return _three_panels(
        results,
        points,
        "age of the edit (edits made since)",
        "Retention: scores after the whole stream, by age of the edit",
    )


def plot_layers(results: Sequence[MethodResult]) -> Any:
    """Share of edits that touched each module, methods by modules."""
    groups = {
        name: [r.layer_frequency for r in group if r.layer_frequency]
        for name, group in group_by_method(results).items()
        if not group[0].is_control
    }
    groups = {name: group for name, group in groups.items() if group}
    modules = list(dict.fromkeys(m for group in groups.values() for f in group for m in f))
    if not modules:
        return None
    share = [
        [statistics.fmean(number(f.get(m)) or 0.0 for f in group) for m in modules]
        for group in groups.values()
    ]
    labels = short_names(modules)
    few = len(groups) * len(modules) <= ANNOTATED and len(modules) <= 24
    cell = 0.55 if few else min(0.4, 12 / len(modules))
    margin = 1.7 + 0.085 * max(map(len, groups))
    height = 1.7 + 0.42 * len(groups) + 0.07 * max(map(len, labels))
    figure = new_figure(max(5.5, margin + cell * len(modules)), height)
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    places, words, title = _module_ticks(labels)
    axes.set_xticks(places, words, rotation=90 if words == labels else 0, fontsize=8)
    axes.set_xlabel(title)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_title("Which modules the edits touch (share of edits)", loc="left", fontsize=11)
    axes.hlines([y + 0.5 for y in range(len(groups) - 1)], -0.5, len(modules) - 0.5, "white", lw=2)
    if few:
        axes.vlines([x + 0.5 for x in range(len(modules) - 1)], -0.5, len(groups) - 0.5, "white")
    for y, row in enumerate(share if few else ()):
        for x, value in enumerate(row):
            colour = "white" if value < 0.55 else "black"
            text = f"{100 * value:.0f}"
            axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=8)
    bar = figure.colorbar(image, ax=axes, pad=0.02, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0%", "50%", "100%"])
    bar.set_label("edits touching it")
    return figure


def plot_methods(results: Sequence[MethodResult]) -> Any:
    """Bars of ES, GS and LS per method, after the stream and for its earliest edits."""
    groups = group_by_method(results)
    panels: list[tuple[str, Callable[[MethodResult], Scores]]] = [
        ("all edits, after the whole stream", attrgetter("scores"))
    ]
    if any(number(getattr(r.retention, m)) is not None for r in results for m in METRICS):
        panels.append(
            ("retention: the earliest edits, after the whole stream", attrgetter("retention"))
        )
    if not results:
        return None
    figure = new_figure(max(7.0, 1.6 + 1.35 * len(groups)), 3.0 * len(panels) + 0.6)
    for index, (title, pick) in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, index + 1)
        _bars(axes, groups, pick)
        axes.set_title(title, loc="left", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


def _bars(axes: Any, groups: Mapping[str, list[MethodResult]], pick: Callable) -> None:
    width = 0.27
    for index, metric in enumerate(METRICS):
        before = []
        for place, group in enumerate(groups.values()):
            value, spread = _mean_sd(getattr(pick(r), metric) for r in group)
            x = place + (index - 1) * width
            label = NAMES[metric] if place == 0 else None
            axes.bar(x, 100 * (value or 0), width * 0.94, color=COLOURS[index], label=label)
            if spread is not None:
                error = 100 * spread
                axes.errorbar(x, 100 * value, error, color="black", capsize=2, linewidth=1)
            # at the foot of a tall bar nothing can cross the number: no error bar, no marker
            tall = (value or 0) > 0.15
            foot = 3 if tall else 100 * ((value or 0) + (spread or 0)) + 2
            text = "–" if value is None else f"{100 * value:.0f}"
            colour = "white" if tall else "black"
            axes.text(x, foot, text, ha="center", va="bottom", fontsize=8, color=colour)
            start = _mean_sd(getattr(r.before, metric) for r in group)[0]
            if start is not None:
                before.append((x, 100 * start))
        label = "before editing" if index == 0 else None
        if before:
            xs, ys = zip(*before, strict=True)
            half = width * 0.47
            axes.hlines(
                ys, [x - half for x in xs], [x + half for x in xs], color="black",
                linestyle=(0, (1.5, 1)), linewidth=1.8, label=label,
            )  # fmt: skip
    long = max(map(len, groups)) > 14
    slant = {"rotation": 20, "ha": "right", "rotation_mode": "anchor"} if long else {}
    axes.set_xticks(range(len(groups)), list(groups), **slant)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylabel("share of prompts")
    _percent_axis(axes, 0, 108)


def plot_training(training: Mapping[str, History]) -> Any:
    """One panel per number recorded in training, over the edits trained on."""
    training = {name: [_mapping(r) for r in history] for name, history in training.items()}
    keys = dict.fromkeys(k for history in training.values() for record in history for k in record)
    keys = [k for k in keys if k not in NO_PANEL]
    keys = [k for k in keys if any(_series(h, k)[1] for h in training.values())][:8]
    if not keys:
        return None
    columns = len(keys) if len(keys) < 4 else math.ceil(len(keys) / 2)
    rows = math.ceil(len(keys) / columns)
    figure = new_figure(max(5.5, 3.4 * columns), 2.9 * rows + 0.4)
    for index, key in enumerate(keys):
        axes = figure.add_subplot(rows, columns, index + 1)
        for (name, history), style in zip(training.items(), _styles(training), strict=True):
            xs, ys = _series(history, key)
            fine = len(xs) > 40
            if not fine or len(set(ys)) > 10:  # of counts and flags only the average can be read
                axes.plot(xs, ys, color=style["color"], alpha=0.25 if fine else 1, linewidth=1)
            if fine:
                smooth = _smooth(ys, len(ys) // 20)
                axes.plot(xs, smooth, color=style["color"], linewidth=1.8, label=name)
            else:
                axes.lines[-1].set_label(name)
        axes.set_title(key, loc="left", fontsize=10)
        axes.set_xlabel("training edits")
        axes.set_ylabel(_unit(key))
        axes.ticklabel_format(axis="y", scilimits=(-3, 4), useOffset=False)
        tidy(axes)
    if len(training) > 1:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return figure


def short_names(modules: Sequence[str]) -> list[str]:
    """``model.layers.2.mlp.gate_proj`` as ``2.gate``; longer only where two would be the same."""
    short = []
    for name in modules:
        layer = re.search(r"\.(\d+)\.", f".{name}")
        last = re.sub(r"_proj$|^dense_", "", name.rsplit(".", 1)[-1])
        short.append(f"{layer.group(1)}.{last}" if layer else last)
    if len(set(short)) == len(short):
        return short
    tails = []
    for name, label in zip(modules, short, strict=True):
        layer = re.search(r"\.(\d+)\.(.*)", f".{name}")
        tails.append(f"{layer.group(1)}.{layer.group(2)}" if layer else label)
    return tails if len(set(tails)) == len(tails) else list(modules)


def _module_ticks(labels: Sequence[str]) -> tuple[list[int], list[str], str]:
    """Places, labels and axis title: every module, or for many every few layers' first module."""
    if len(labels) <= 48:
        return list(range(len(labels))), list(labels), "editable module (layer.projection)"
    firsts: dict[str, int] = {}
    for place, label in enumerate(labels):
        firsts.setdefault(label.split(".")[0], place)
    every = math.ceil(len(firsts) / 30)
    chosen = list(firsts.items())[::every]
    return [place for _, place in chosen], [layer for layer, _ in chosen], "layer"


def _three_panels(
    results: Sequence[MethodResult],
    points: Mapping[str, Sequence[Mapping[int, Scores]]],
    xlabel: str,
    title: str,
) -> Any:
    if not any(points.values()):
        return None
    controls = {n for n, g in group_by_method(results).items() if g[0].is_control}
    figure = new_figure(11.5, 4.0)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    for index, metric in enumerate(METRICS):
        axes = figure.add_subplot(1, 3, index + 1)
        for (name, seeds), style in zip(points.items(), _styles(points, controls), strict=True):
            xs = sorted({x for seed in seeds for x in seed})
            both = [(x, *_mean_sd(getattr(s[x], metric) for s in seeds if x in s)) for x in xs]
            both = [(x, 100 * m, 100 * (d or 0)) for x, m, d in both if m is not None]
            if not both:
                continue
            xs, ys, spread = zip(*both, strict=True)
            axes.plot(xs, ys, label=name, markersize=4, linewidth=1.6, **style)
            if any(spread):
                low = [y - d for y, d in zip(ys, spread, strict=True)]
                high = [y + d for y, d in zip(ys, spread, strict=True)]
                axes.fill_between(xs, low, high, color=style["color"], alpha=0.18, linewidth=0)
        axes.set_title(NAMES[metric], loc="left", fontsize=10)
        axes.set_xlabel(xlabel)
        _percent_axis(axes, -3, 103)
    figure.axes[0].set_ylabel("share of prompts")
    handles = {}
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    ordered = {n: handles[n] for n in points if n in handles}
    fit = max(1, 125 // (max(map(len, ordered), default=0) + 7))  # in characters of the width
    columns = min(fit, len(ordered))
    figure.legend(
        ordered.values(), ordered, loc="outside lower center", ncols=columns, frameon=False
    )
    return figure


def new_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need Matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _styles(names: Iterable[str], controls: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Colour, marker and line of each method; controls are grey, dashes begin with the ninth."""
    styles, used = [], 0
    for name in names:
        if name in controls:
            styles.append({"color": CONTROL, "marker": "", "linestyle": ":"})
            continue
        line = ("-", "--", "-.")[used // len(COLOURS) % 3]
        index = used % len(COLOURS)
        styles.append({"color": COLOURS[index], "marker": MARKERS[index], "linestyle": line})
        used += 1
    return styles


def _percent_axis(axes: Any, low: float, high: float) -> None:
    axes.set_ylim(low, high)
    axes.set_yticks(range(0, 101, 20), [f"{v}%" for v in range(0, 101, 20)])
    tidy(axes)


def tidy(axes: Any) -> None:
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _mean_sd(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    known = [v for v in map(number, values) if v is not None]
    if not known:
        return None, None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def _mapping(record: Any) -> Mapping[str, Any]:
    return dataclasses.asdict(record) if dataclasses.is_dataclass(record) else record


def _series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """(edits, values) of ``key``, records that lack it or are not finite left out."""
    pairs = []
    for index, record in enumerate(history):
        value = record.get(key)
        value = None if isinstance(value, str) else number(value)
        if value is not None:
            place = next((record[k] for k in X_KEYS if k in record), index + 1)
            pairs.append((place, value))
    return [x for x, _ in pairs], [y for _, y in pairs]


def _smooth(values: Sequence[float], half: int) -> list[float]:
    """Centred moving average over ``2 half + 1`` values."""
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


UNITS = {
    "loss": "loss",
    "paraphrase": "nats per token",
    "locality": "nats",
    "kl": "nats",
    "size": "energy or squared norm",
    "layers": "modules per edit",
    "passes": "passes per edit",
    "held": "share of edits",
}


def _unit(key: str) -> str:
    """The axis label of a number recorded in training."""
    return UNITS.get(key.rsplit("/", 1)[-1], "value")
