"""Edit requests: from a file, checked before anything is loaded, or from a pipe, line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hiedit.data.records import load_records
from hiedit.data.schemas import RowProblems, Schema, detect_schema, get_schema
from hiedit.types import EditRequest


@dataclass(frozen=True)
class Row:
    """One line of the input, counted from 1 (of a JSON list: its place), as a request or with all
    that is wrong with it."""

    line: int
    request: EditRequest | None
    problems: tuple[str, ...] = ()


def from_file(path: Path, schema: str | None, skip_bad_rows: bool) -> list[Row]:
    """Every row, malformed ones included where they are to be skipped.

    Raises:
        RecordError: as ``load_records``.
    """
    records = load_records(path, schema, skip_bad_rows=skip_bad_rows)
    bad: dict[int, list[str]] = {}
    for error in records.skipped:
        bad.setdefault(error.row, []).append(f"{error.field} {error.problem}".strip())
    requests = iter(records.requests)
    return [
        Row(line, None, tuple(bad[line])) if line in bad else Row(line, next(requests))
        for line in _numbers(path.expanduser(), len(records) + len(bad))
    ]


def from_lines(stream: BinaryIO, schema: str | None) -> Iterator[Row]:
    """The rows of JSON Lines as they arrive; blank lines are passed over.

    Raises:
        ValueError: if no schema has that name, before the first line is read.
    """
    named = None if schema is None else get_schema(schema)
    return _rows(stream, named)


def _numbers(path: Path, rows: int) -> list[int]:
    """The numbers by which ``load_records`` calls the rows."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return list(range(1, rows + 1))
    return [n for n, line in enumerate(text.split("\n"), 1) if line.strip()]


def _rows(stream: BinaryIO, named: Schema | None) -> Iterator[Row]:
    # readline, not iteration: a line must be seen when it is there, not when a buffer is full
    for number, line in enumerate(iter(stream.readline, b""), 1):
        if line.strip():
            yield _row(number, line, named)


def _row(number: int, line: bytes, named: Schema | None) -> Row:
    try:
        value = json.loads(line.decode("utf-8-sig"))
        request = (named or detect_schema(value)).convert(value)
    except RowProblems as error:
        return Row(number, None, tuple(f"{f} {what}".strip() for f, what in error.problems))
    except UnicodeDecodeError as error:
        return Row(number, None, (f"is not UTF-8 text: byte 0x{line[error.start]:02x}",))
    except json.JSONDecodeError as error:
        return Row(number, None, (f"is no JSON: {error.msg}, char {error.pos + 1}",))
    except RecursionError:
        return Row(number, None, ("is no JSON: nested too deeply",))
    except ValueError as error:
        return Row(number, None, (str(error),))
    return Row(number, request)
