"""Reading a file of edit records (a JSON list, or JSON Lines) into requests, or to a list of all
that is wrong with it.

`datasets` reads the file, as text. Its own JSON loader is no use to someone who needs to know which
row is wrong: Arrow infers types block by block, so that a number in a column of text becomes text,
dates become timestamps and null rows become rows of nulls. The rows are therefore parsed here.
"""

from __future__ import annotations

import difflib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hiedit.data.schemas import RowProblems, Schema, describe, detect_schema, get_schema
from hiedit.types import EditRequest

SHOWN = 20  # problems that an error message spells out
SUFFIXES = (".json", ".jsonl", ".ndjson")


@dataclass(frozen=True)
class RowError:
    """A problem with one field of one row.

    row: counted from 1; in JSON Lines the line of the file, otherwise the place in the list.
    field: dotted path, or "" where it concerns the row as a whole.
    """

    row: int
    field: str
    problem: str

    def __str__(self) -> str:
        return f"row {self.row}: " + f"{self.field} {self.problem}".strip()


class RecordError(ValueError):
    """A file that cannot be used, with every reason: ``path``, and ``errors`` by row (empty where
    the file as a whole is at fault). The message spells out the first 20."""

    def __init__(self, path: Path, problem: str, errors: Iterable[RowError] = (), hint: str = ""):
        self.path = path
        self.errors = tuple(errors)
        lines = [f"{path}: {problem}", *(f"  {error}" for error in self.errors[:SHOWN])]
        if len(self.errors) > SHOWN:
            fields = Counter(error.field or "the whole row" for error in self.errors)
            most = ", ".join(f"{name} {count}" for name, count in fields.most_common(8))
            lines.append(f"  ... {len(self.errors)} problems in all (by field: {most})")
        super().__init__("\n".join(lines + ([hint] if hint else [])))


@dataclass(frozen=True)
class Records:
    """The requests of a file, in its order.

    schema: name of the format. skipped: what was wrong with the rows left out (a row may be named
    several times), empty unless bad rows were to be skipped.
    """

    requests: tuple[EditRequest, ...]
    schema: str
    path: Path
    skipped: tuple[RowError, ...] = ()

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def skipped_rows(self) -> int:
        """Return how many rows were left out."""
        return len({error.row for error in self.skipped})


def load_records(
    path: str | Path, schema: str | None = None, skip_bad_rows: bool = False
) -> Records:
    """The edit requests in ``path``.

    Args:
        path: a JSON file that holds a list of objects, or JSON Lines.
        schema: name of the format, see `hiedit.data.schemas.SCHEMAS`; None recognises it from the
            fields of the rows.
        skip_bad_rows: leave out malformed rows and list them in ``Records.skipped``. A list that is
            cut off or otherwise no JSON is an error all the same, for nobody knows what it lacks.

    Raises:
        RecordError: (a ValueError) naming all malformed rows at once, or what is wrong with the
            file: it is missing, empty, no JSON, of another schema, without any good row.
        ValueError: if no schema has that name.
        ImportError: if `datasets` is not installed.
    """
    named = None if schema is None else get_schema(schema)
    path = _existing(Path(path).expanduser())
    rows, errors = _parse(path, _read_text(path))
    chosen = _choose_schema(path, rows, errors, named)
    requests = []
    for number, row in rows:
        try:
            requests.append(chosen.convert(row))
        except RowProblems as error:
            errors += [RowError(number, field, problem) for field, problem in error.problems]
    errors.sort(key=lambda error: error.row)
    if errors and not (skip_bad_rows and requests):
        bad = len({error.row for error in errors})
        raise RecordError(
            path,
            f"{bad} of {bad + len(requests)} rows cannot be used as schema {chosen.name!r}",
            errors,
            "Mend them, or leave them out: skip_bad_rows=True, on the command line --skip-bad-rows."
            if requests
            else "No row is left.",
        )
    return Records(tuple(requests), chosen.name, path, tuple(errors))


def _existing(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        raise RecordError(path, f"is a directory{_listing(path)}; name a file")
    folder = path.parent
    if folder.is_dir():
        names = [entry.name for entry in folder.iterdir()]
        near = difflib.get_close_matches(path.name, names, 1)
        hint = f"; did you mean {folder / near[0]}?" if near else _listing(folder)
    else:
        while not folder.is_dir():
            missing, folder = folder, folder.parent
        names = [entry.name for entry in folder.iterdir() if entry.is_dir()]
        near = difflib.get_close_matches(missing.name, names, 1)
        hint = f"; there is no directory {missing}"
        hint += f", did you mean {folder / near[0]}?" if near else ""
    raise RecordError(path, f"no such file{hint}")


def _listing(folder: Path) -> str:
    found = sorted(entry.name for entry in folder.iterdir() if entry.suffix in SUFFIXES)
    more = ", ..." if len(found) > 5 else ""
    return f"; {folder} holds " + (", ".join(found[:5]) + more if found else "no JSON files")


@contextmanager
def _no_progress_bars(datasets):
    if datasets.utils.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _read_text(path: Path) -> str:
    try:
        import datasets  # here, for it takes a second and most of the package has no use for it
    except ImportError as error:
        raise ImportError(
            "reading record files needs the package datasets: pip install datasets"
        ) from error
    with _no_progress_bars(datasets), tempfile.TemporaryDirectory() as cache:
        try:  # a cache of our own: the shared one would keep a copy of every file ever read
            table = datasets.Dataset.from_text(
                str(path), cache_dir=cache, keep_in_memory=True, sample_by="document"
            )
            text = table[0]["text"]
        except Exception as error:  # datasets wraps what went wrong in errors of its own
            raise RecordError(path, _why_unreadable(path, error)) from error
    return text.removeprefix("\ufeff")


def _why_unreadable(path: Path, error: Exception) -> str:
    raw = path.read_bytes()
    try:
        raw.decode()
    except UnicodeDecodeError as wrong:
        line = raw.count(b"\n", 0, wrong.start) + 1
        return f"is not UTF-8 text: byte 0x{raw[wrong.start]:02x} in line {line}"
    return f"cannot be read: {error.__cause__ or error}"


def _load_json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None


def _parse(path: Path, text: str) -> tuple[list[tuple[int, Any]], list[RowError]]:
    """The rows with their numbers, and the lines that are no JSON."""
    start = text.lstrip()[:1]
    if not start:
        raise RecordError(path, "is empty")
    if start == "[":
        return _parse_list(path, text), []
    rows, errors = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append((number, _load_json(line)))
            except json.JSONDecodeError as error:
                errors.append(
                    RowError(number, "", f"is no JSON: {error.msg}, char {error.pos + 1}")
                )
    if not any(isinstance(row, dict) for _, row in rows):
        _reject_document(path, text, errors)
    return rows, errors


def _reject_document(path: Path, text: str, errors: list[RowError]) -> None:
    """A file without one object a line: either one JSON document over many lines, or neither."""
    try:
        document = _load_json(text)
    except json.JSONDecodeError:
        raise RecordError(
            path, "is neither a JSON list of objects nor JSON Lines", errors
        ) from None
    keys = ""
    if isinstance(document, dict):
        lists = [key for key, value in document.items() if isinstance(value, list)]
        keys = f"; its field {lists[0]!r} is a list: save that alone" if lists else ""
    raise RecordError(path, f"holds {describe(document)}, not a list of objects{keys}")


def _parse_list(path: Path, text: str) -> list[tuple[int, Any]]:
    try:
        return list(enumerate(_load_json(text), 1))
    except json.JSONDecodeError as error:
        row = _rows_before(text, error.pos) + 1
        cut = "" if text.rstrip().endswith("]") else "; the file seems to be cut off"
        raise RecordError(
            path,
            f"is no JSON: {error.msg}: line {error.lineno}, column {error.colno}, "
            f"in row {row}{cut}",
        ) from None


def _rows_before(text: str, end: int) -> int:
    """Return how many elements of the list are whole before position ``end``."""
    decoder, count, at = json.JSONDecoder(), 0, text.index("[") + 1
    while True:
        while at < end and (text[at].isspace() or text[at] == ","):
            at += 1
        try:
            _, at = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError):
            return count
        if at > end:
            return count
        count += 1


def _choose_schema(
    path: Path, rows: list[tuple[int, Any]], errors: list[RowError], named: Schema | None
) -> Schema:
    """The named schema, or that of most rows, so that one odd row does not decide for all."""
    objects = [(number, row) for number, row in rows if isinstance(row, dict)]
    if not objects:
        wrong = [RowError(n, "", f"is {describe(row)}, not an object") for n, row in rows]
        raise RecordError(path, "holds no record" if rows else "is an empty list", wrong)
    found: Counter[str] = Counter()
    refusals = []
    for number, row in objects:
        try:
            found[detect_schema(row).name] += 1
        except ValueError as error:
            refusals.append(f"in row {number} {error}")
    likely = found.most_common(1)[0][0] if found else None
    if named is None:
        if likely is None:
            raise RecordError(path, f"its schema is not recognised: {refusals[0]}", errors)
        return get_schema(likely)
    if all(named.lacks(row) for _, row in objects):
        lacks = ", ".join(named.lacks(objects[0][1]))
        hint = f"; its fields are those of {likely!r}" if likely else f"; {refusals[0]}"
        raise RecordError(path, f"is not of schema {named.name!r}: it lacks {lacks}{hint}", errors)
    return named
