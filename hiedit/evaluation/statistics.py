"""Is one method better than another? Means, intervals and paired tests over seeds.

Everything works on the rows of results.json and pairs them by (seed, edits, stream): two methods
are compared on the same streams or not at all. SciPy is imported when a test is computed.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hiedit.evaluation.results import METRICS, number

Row = Mapping[str, Any]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Paired:
    """The differences ``method - baseline`` over the same seeds and streams.

    difference: mean difference. low, high: its 95% confidence interval (Student's t).
    t_p, wilcoxon_p, permutation_p: two-sided p-values. The exact tests of the last two cannot fall
        below 2 ** (1 - n): 0.0625 at 5 seeds, so 6 seeds are the fewest that can show p < 0.05 by
        them, and 8 for p < 0.01.
    With a single pair everything but ``difference`` is None.
    """

    baseline: str
    n: int
    difference: float
    low: float | None
    high: float | None
    t_p: float | None
    wilcoxon_p: float | None
    permutation_p: float | None = None


@dataclass(frozen=True)
class Summary:
    """One method and metric over its seeds, and against the baseline (None for itself)."""

    method: str
    metric: str
    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None
    paired: Paired | None = None


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def sd(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1), None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def confidence_interval(
    values: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """Student's t interval of the mean, None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy import stats

    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * sd(values) / math.sqrt(len(values))
    return mean(values) - float(half), mean(values) + float(half)


def paired_t_test(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Two-sided p of Student's paired t-test; 1 if all pairs are equal, None below two pairs."""
    differences = _differences(a, b)
    if len(differences) < 2:
        return None
    if not any(differences):
        return 1.0
    if sd(differences) <= 1e-12 * max(map(abs, differences)):  # the statistic is x / 0
        return 0.0
    from scipy import stats

    return float(stats.ttest_rel(a, b).pvalue)


def wilcoxon_test(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test; equal pairs as in ``paired_t_test``."""
    differences = _differences(a, b)
    if len(differences) < 2:
        return None
    if not any(differences):
        return 1.0
    from scipy import stats

    return float(stats.wilcoxon(differences).pvalue)


def permutation_test(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Two-sided p of the paired permutation test: of all ways to swap the members of pairs, the
    share whose mean difference is at least as large. None below two pairs.

    All ``2 ** n`` of them up to 16 pairs, so that p cannot fall below ``2 ** (1 - n)``: 0.0625 at
    5 seeds, 0.0078 at 8; beyond that 65,536 random ones with a fixed seed.
    """
    differences = _differences(a, b)
    if len(differences) < 2:
        return None
    wanted = abs(math.fsum(differences)) * (1 - 1e-12)
    n = len(differences)
    if n <= 16:
        signs = itertools.product((1, -1), repeat=n)
        total = 2**n
    else:
        rng = random.Random(0)
        total = 2**16
        signs = (rng.choices((1, -1), k=n) for _ in range(total - 1))
    hits = sum(abs(sum(s * d for s, d in zip(sign, differences, strict=True))) >= wanted
               for sign in signs)  # fmt: skip
    return (hits if n <= 16 else hits + 1) / total


def holm(p_values: Mapping[Any, float | None]) -> dict[Any, float | None]:
    """p-values corrected for how many there are (Holm 1979, step down); None stays None."""
    known = sorted((p, i, key) for i, (key, p) in enumerate(p_values.items()) if p is not None)
    corrected: dict[Any, float | None] = dict.fromkeys(p_values)
    largest = 0.0
    for rank, (p, _, key) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[key] = largest
    return corrected


def compare(rows: Sequence[Row], method: str, baseline: str, metric: str) -> Paired:
    """``method`` against ``baseline`` on ``metric``, paired.

    Raises:
        ValueError: if the two were not run with the same seeds and streams, if a value of either
            is missing (a run that diverged must not drop out unseen), or if one is unknown.
    """
    ours, theirs = _by_pair(rows, method, metric), _by_pair(rows, baseline, metric)
    if ours.keys() != theirs.keys():
        lonely = [f"{method}: {_describe(k)}" for k in sorted(ours.keys() - theirs.keys())]
        lonely += [f"{baseline}: {_describe(k)}" for k in sorted(theirs.keys() - ours.keys())]
        raise ValueError(
            f"{method!r} and {baseline!r} were not run with the same seeds and streams; "
            f"without a partner: {'; '.join(lonely)}"
        )
    a, b = [ours[k] for k in ours], [theirs[k] for k in ours]
    differences = _differences(a, b)
    low, high = confidence_interval(differences) or (None, None)
    return Paired(
        baseline=baseline,
        n=len(differences),
        difference=mean(differences),
        low=low,
        high=high,
        t_p=paired_t_test(a, b),
        wilcoxon_p=wilcoxon_test(a, b),
        permutation_p=permutation_test(a, b),
    )


def summarise(
    rows: Sequence[Row], metric: str, baseline: str | None = None, edits: int | None = None
) -> list[Summary]:
    """Every method's ``metric`` over its seeds, compared with ``baseline`` if one is named.

    ``edits`` picks the rows of one stream length. Methods come in the order of ``rows``; one that
    has no value at all (locality accuracy where there is no gold answer) is left out. P-values are
    not corrected for the number of methods compared.

    Raises:
        ValueError: as ``compare``; for a metric that no row has; for rows of several lengths.
    """
    rows = [row for row in rows if edits is None or row["edits"] == edits]
    lengths = sorted({row["edits"] for row in rows})
    if len(lengths) > 1:
        raise ValueError(f"the rows are of streams of {lengths} edits: choose one with edits=")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    if baseline is not None and baseline not in methods:
        raise ValueError(f"baseline {baseline!r} is not among the methods {methods}")
    if rows and not any(metric in row for row in rows):
        raise ValueError(f"no row has the metric {metric!r}; there are {sorted(rows[0])}")
    summaries = []
    for method in methods:
        if all(number(r.get(metric)) is None for r in rows if r["method"] == method):
            continue
        values = list(_by_pair(rows, method, metric).values())
        low, high = confidence_interval(values) or (None, None)
        other = baseline is not None and method != baseline
        paired = compare(rows, method, baseline, metric) if other else None
        summaries.append(
            Summary(method, metric, len(values), mean(values), sd(values), low, high, paired)
        )
    return summaries


def gains(row: Row, rows: Sequence[Row], baseline: str) -> dict[str, float]:
    """``row`` minus the row of ``baseline`` with its seed, edits and stream, by score.

    Empty for the baseline itself and where it has no such row.
    """
    same = ("seed", "edits", "stream")
    partners = [
        r for r in rows if r["method"] == baseline and all(r.get(k) == row.get(k) for k in same)
    ]
    if row["method"] == baseline or not partners:
        return {}
    found = {}
    for name in (*METRICS, *(f"retention_{m}" for m in METRICS)):
        ours, theirs = number(row.get(name)), number(partners[0].get(name))
        if ours is not None and theirs is not None:
            found[name] = ours - theirs
    return found


def _differences(a: Sequence[float], b: Sequence[float]) -> list[float]:
    if len(a) != len(b):
        raise ValueError(f"a paired test needs pairs: {len(a)} and {len(b)} values were given")
    return [x - y for x, y in zip(a, b, strict=True)]


def _by_pair(rows: Sequence[Row], method: str, metric: str) -> dict[tuple, float]:
    """``metric`` of ``method`` by (seed, edits, stream)."""
    values = {}
    for row in rows:
        if row["method"] != method:
            continue
        key = (row["seed"], row["edits"], row.get("stream") or "")
        value = number(row.get(metric))
        if value is None:
            raise ValueError(f"{method} has no finite {metric} for {_describe(key)}")
        if key in values:
            raise ValueError(f"{method} has two rows for {_describe(key)}")
        values[key] = value
    if not values:
        known = sorted({row["method"] for row in rows})
        raise ValueError(f"no row of method {method!r}; there are {known}")
    return values


def _describe(key: tuple) -> str:
    seed, edits, stream = key
    return f"seed {seed}, {edits} edits" + (f", stream {stream}" if stream else "")
