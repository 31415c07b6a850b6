"""Results of an evaluation: dataclasses, and the files that hold them.

    run directory
        results.json   a list of flat rows, one per method, seed and stream length (``row()``)
        details.json   the same results in full: curves, ages, layers, examples, configuration

Standard library only, so that results can be read where torch is not installed. Numbers that are
not finite are written as null and read back as None ("not measured").
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hiedit.durable import write_text
from hiedit.evaluation.scores import METRICS, SCORES, Scores, number

RESULTS, DETAILS = "results.json", "details.json"


@dataclass(frozen=True)
class CurvePoint:
    """Scores over all edits so far, measured when ``edits`` edits had been applied."""

    edits: int
    scores: Scores


@dataclass(frozen=True)
class Example:
    """One edit in words: what the model answered before and after the whole stream.

    locality_kept: the unrelated prompt's answer agrees as the score LS wants it; None: not known.
    """

    prompt: str
    old: str | None
    target: str
    before: str
    after: str
    heldout_prompt: str | None = None
    heldout_after: str | None = None
    locality_prompt: str | None = None
    locality_before: str | None = None
    locality_after: str | None = None
    locality_kept: bool | None = None


@dataclass(frozen=True)
class Said:
    """Continuations of an everyday prompt by the model, before and after the whole stream."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class MethodResult:
    """One method on one stream with one seed.

    scores: over all edits, after the whole stream. before: the same before the first edit.
    retention: scores of the earliest ``retention_edits`` edits, after the whole stream.
    immediate: scores of each edit right after it was made.
    superseded: edits whose fact a later one gave another answer; standing: scores of the others,
        None where every edit stands (then they are ``scores``).
    curve: scores over the number of edits. by_age: (bucket start, scores) with the age of an edit
        counted in edits made since it, 0 for the latest.
    kl: mean KL of the edited from the unedited model on locality prompts, nats.
    weight_growth: relative growth of the Frobenius norm, by module (0.01 is one percent).
    layer_frequency: share of edits that touched the module, by module, in the model's order.
    seconds_per_edit: editing alone; processor_seconds_per_edit: the same, of all cores together.
    amortised_seconds_per_edit: with training divided over the stream. train_seconds,
        train_edits: what training the editor took. peak_memory_mb: MiB.
    rejected: edits that the guard kept out, None where it was off. everyday: what the model says
        to prompts that have nothing to do with the edits.
    stream: ``stream_fingerprint`` of the evaluated stream; pairs runs for statistics.
    """

    method: str
    seed: int
    edits: int
    scores: Scores
    before: Scores = Scores()
    retention: Scores = Scores()
    retention_edits: int | None = None
    immediate: Scores | None = None
    superseded: int = 0
    standing: Scores | None = None
    curve: tuple[CurvePoint, ...] = ()
    by_age: tuple[tuple[int, Scores], ...] = ()
    kl: float | None = None
    weight_growth: Mapping[str, float] = field(default_factory=dict)
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    layers_per_edit: float | None = None
    passes_per_edit: float | None = None
    seconds_per_edit: float | None = None
    processor_seconds_per_edit: float | None = None
    train_seconds: float | None = None
    train_edits: int | None = None
    amortised_seconds_per_edit: float | None = None
    peak_memory_mb: float | None = None
    layer_frequency: Mapping[str, float] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()
    stream: str | None = None
    rejected: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    everyday: tuple[Said, ...] = ()

    @property
    def key(self) -> tuple[str, int, int]:
        return self.method, self.seed, self.edits

    @property
    def is_control(self) -> bool:
        """Tell whether nothing was edited: the control whose locality is perfect by definition."""
        return self.layers_per_edit == 0

    def row(self) -> dict[str, Any]:
        """The flat row of results.json; fractions in [0, 1], None where not measured."""
        row: dict[str, Any] = {"method": self.method, "seed": self.seed, "edits": self.edits}
        row |= {name: getattr(self.scores, name) for name in METRICS}
        row |= {f"retention_{name}": getattr(self.retention, name) for name in METRICS}
        for name in ("layers_per_edit", "passes_per_edit", "seconds_per_edit"):
            row[name] = number(getattr(self, name))
        row |= {name: getattr(self.scores, name) for name in SCORES[3:]}
        row |= {f"retention_{name}": getattr(self.retention, name) for name in SCORES[3:]}
        row |= {f"before_{name}": getattr(self.before, name) for name in SCORES}
        for part in ("immediate", "standing"):
            found = getattr(self, part) or Scores()
            row |= {f"{part}_{name}": getattr(found, name) for name in SCORES}
        growth = [v for v in map(number, self.weight_growth.values()) if v is not None]
        row["weight_growth"] = sum(growth) / len(growth) if growth else None
        row["weight_growth_max"] = max(growth, default=None)
        for name in _ROW_NUMBERS:
            row[name] = number(getattr(self, name))
        row |= {"retention_edits": self.retention_edits, "train_edits": self.train_edits}
        row |= {"stream": self.stream, "rejected": self.rejected, "superseded": self.superseded}
        return row


_ROW_NUMBERS = (
    "kl",
    "perplexity_before",
    "perplexity_after",
    "train_seconds",
    "processor_seconds_per_edit",
    "amortised_seconds_per_edit",
    "peak_memory_mb",
)


def stream_fingerprint(requests: Iterable[Any]) -> str:
    """12 hex digits that are equal for equal streams of ``EditRequest`` in the same order."""
    digest = hashlib.sha256()
    for request in requests:
        digest.update(json.dumps([request.prompt, request.target]).encode())
    return digest.hexdigest()[:12]


def plain(value: Any) -> Any:
    """``value`` as JSON types: not finite becomes None, other objects become their string."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [plain(v) for v in items]
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return plain(value.item())  # a NumPy or torch scalar
    return str(value)


def from_plain(data: Mapping[str, Any]) -> MethodResult:
    """The inverse of ``plain`` for a MethodResult.

    Raises:
        ValueError: if a required field is missing. Unknown fields of newer versions are ignored.
    """
    known = {f.name for f in dataclasses.fields(MethodResult)}
    values = {k: v for k, v in data.items() if k in known}
    for name in ("scores", "before", "retention", "immediate", "standing"):
        if values.get(name) is not None:
            values[name] = Scores(**values[name])
    points = values.get("curve", ())
    values["curve"] = tuple(CurvePoint(p["edits"], Scores(**p["scores"])) for p in points)
    values["by_age"] = tuple((age, Scores(**s)) for age, s in values.get("by_age", ()))
    values["examples"] = tuple(Example(**e) for e in values.get("examples", ()))
    values["everyday"] = tuple(Said(**e) for e in values.get("everyday", ()))
    try:
        return MethodResult(**values)
    except TypeError as error:
        raise ValueError(f"a result lacks a required field: {error}") from error


def write_results(path: str | Path, results: Sequence[MethodResult]) -> Path:
    """Write results.json (``path``, or that file in the directory ``path``) and details.json.

    Each file is replaced whole: a reader, or a crash, sees the old one or the new one.
    """
    path = _results_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path.with_name(DETAILS), [plain(r) for r in results])
    _replace(path, [r.row() for r in results])
    return path


def append_results(path: str | Path, results: Sequence[MethodResult]) -> Path:
    """Add ``results`` to what is there; a row of the same method, seed and edits is replaced.

    Safe when several seeds run side by side and finish at once.
    """
    path = _results_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        details = path.with_name(DETAILS)
        full = [plain(r) for r in results]
        _replace(details, _merge(_read_list(details) if details.exists() else [], full))
        rows = [r.row() for r in results]
        _replace(path, _merge(_read_list(path) if path.exists() else [], rows))
    return path


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The rows of results.json (``path``, or that file in the directory ``path``).

    Raises:
        FileNotFoundError, ValueError: with the path, if there is none or it is not such a file.
    """
    return _read_list(_results_path(path))


def read_details(path: str | Path) -> list[MethodResult]:
    """The full results beside results.json; ``path`` as in ``read_results``."""
    details = _results_path(path).with_name(DETAILS)
    return [from_plain(entry) for entry in _read_list(details)]


def _results_path(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / RESULTS


def _merge(old: list[dict], new: list[dict]) -> list[dict]:
    """``old`` with the entries of ``new`` in place of those with their key, the rest after it."""
    merged = {(e.get("method"), e.get("seed"), e.get("edits")): e for e in old}
    merged |= {(e["method"], e["seed"], e["edits"]): e for e in new}
    return list(merged.values())


def _read_list(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold a list of objects, one per method and seed")
    return rows


def _replace(path: Path, data: Any) -> None:
    """Write ``data`` as JSON, in ASCII: any string can be written."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[int | None]:
    if os.name != "posix":
        yield None
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the directory ``path`` (no lock file is left behind)."""
    with _directory(path) as handle:
        if handle is not None:
            import fcntl  # POSIX only

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
