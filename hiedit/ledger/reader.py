"""Reading a ledger: history, factors, attachments. Any number of readers, also beside a writer."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from hiedit.ledger import files, schema
from hiedit.ledger.errors import DamagedError
from hiedit.ledger.fingerprint import ModuleInfo
from hiedit.ledger.records import (
    ACTIVE,
    FOLDED,
    Event,
    Record,
    factor_specs,
    request_from,
)
from hiedit.provenance import digest
from hiedit.types import Shift

DAMAGED_SEGMENT = (
    "put the file back from a copy of the ledger, or give these edits up for good with "
    "hiedit.ledger.drop_damaged(directory)"
)
_RECORD = """SELECT edits.id, created, status, request, method, shifts, report, segments.file
             FROM edits LEFT JOIN segments ON segments.id = edits.segment"""


@dataclass(frozen=True)
class Attachment:
    """State of an editor beside the edits: ``tensors`` by name, as of the edits up to ``upto``."""

    upto: int
    tensors: Mapping[str, Tensor]


class Reader:
    """A reader of a ledger, as it is at the moment of each call. ``Ledger.read`` makes one.

    Raises:
        ValueError: if there is no ledger in ``directory``.
        LedgerError: if its format is a later one.
    """

    def __init__(self, directory: Path, connection: tuple[sqlite3.Connection, Callable] | None):
        self.directory = directory
        self.db, self._close = connection or schema.connect_to_read(directory)

    def close(self) -> None:
        self._close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @cached_property
    def modules(self) -> dict[str, ModuleInfo]:
        """The editable modules of the base model, in its order."""
        columns = "name, rows, columns, conv1d, dtype, sha256"
        rows = self.db.execute(f"SELECT {columns} FROM modules ORDER BY position")
        return {n: ModuleInfo(n, r, c, bool(conv), d, s) for n, r, c, conv, d, s in rows}

    def history(self) -> list[Record]:
        """Every edit that was ever committed, in canonical order."""
        return self._records("ORDER BY edits.id")

    def record(self, edit: int) -> Record:
        """Raises ValueError for an id that was never given."""
        found = self._records("WHERE edits.id = ?", edit)
        if not found:
            raise ValueError(f"there is no edit {edit!r} in {self.directory}: {self._known()}")
        return found[0]

    def find(self, prompt: str) -> list[Record]:
        """The edits in effect (active or folded) with exactly this prompt, in canonical order."""
        found = self._records("WHERE prompt = ? ORDER BY edits.id", digest(prompt))
        return [r for r in found if r.request.prompt == prompt and r.status in (ACTIVE, FOLDED)]

    def events(self) -> list[Event]:
        """Return what was done to the ledger, in order."""
        rows = self.db.execute("SELECT id, time, what, ids FROM events ORDER BY id")
        return [Event(i, time, what, tuple(json.loads(ids))) for i, time, what, ids in rows]

    def shifts(self, edit: int) -> dict[str, Shift]:
        """The factors of one edit by module name, fp32, scale multiplied into B.

        Raises:
            ValueError: for an unknown id, or one whose factors are gone.
            DamagedError: if its file is damaged there, naming both.
        """
        held = self._held(edit)
        found = list(files.tensors(held.specs, self._read(edit, held)).values())
        return {name: Shift(*found[2 * i : 2 * i + 2]) for i, name in enumerate(held.names)}

    def memory(self, edit: int) -> dict[str, Tensor]:
        """The tensors that the editor kept with one edit. Raises as ``shifts``."""
        prefix = f"{edit}/memory/"
        held = self._held(edit)
        found = files.tensors(held.specs, self._read(edit, held))
        return {n.removeprefix(prefix): t for n, t in found.items() if n.startswith(prefix)}

    def layers(self, after: int = 0, upto: int | None = None) -> list[tuple[int, str, set[str]]]:
        """(id, status, modules) of the edits that are active or reverted, after < id <= upto."""
        query = """SELECT id, status, shifts FROM edits WHERE id > ? AND id <= ?
                   AND status IN ('active', 'reverted') ORDER BY id"""
        last = upto if upto is not None else 2**62
        names = list(self.modules)
        # Fetched at once: an open cursor would hold back the log's checkpoints.
        return [
            (edit, status, {names[position] for position, _ in json.loads(shifts)})
            for edit, status, shifts in self.db.execute(query, (after, last)).fetchall()
        ]

    def active(self, after: int = 0, upto: int | None = None) -> Iterator[dict[str, Shift]]:
        """The factors of the active edits with after < id <= upto, in order."""
        for edit, status, _ in self.layers(after, upto):
            if status == ACTIVE:
                yield self.shifts(edit)

    def newest(self) -> int:
        """The largest id given so far, 0 if none was."""
        return self.db.execute("SELECT max(id) FROM edits").fetchone()[0] or 0

    def in_effect(self) -> int:
        """Return how many edits are active or folded."""
        query = "SELECT count(*) FROM edits WHERE status IN ('active', 'folded')"
        return self.db.execute(query).fetchone()[0]

    def load_attachment(self, name: str, tag: str) -> Attachment | None:
        """Return what ``save_attachment`` stored last under this name; None if nothing, or another
        tag.

        Raises:
            DamagedError: if its file is damaged.
        """
        row = self.db.execute(
            "SELECT upto, file, parts FROM attachments WHERE name = ? AND tag = ?", (name, tag)
        ).fetchone()
        if row is None:
            return None
        upto, file, parts = row
        found = {}
        for specs, place in parts_from(parts):
            data = files.read(self.directory / "attachments" / file, place)
            found |= files.tensors(specs, data)
        return Attachment(upto, found)

    def verify(self):
        """A ``Verification`` of every file and checksum; see ``verify.verify``."""
        from hiedit.ledger.verify import verify

        return verify(self)

    def bytes(self) -> int:
        """Size on disk, of everything."""
        return sum(p.stat().st_size for p in self.directory.rglob("*") if p.is_file())

    def _records(self, where: str, *values) -> list[Record]:
        names = list(self.modules)
        found = []
        for row in self.db.execute(f"{_RECORD} {where}", values):
            edit, created, status, request, method, shifts, report, segment = row
            pairs = json.loads(shifts)
            layers, ranks = tuple(names[p] for p, _ in pairs), tuple(rank for _, rank in pairs)
            found.append(
                Record(edit, created, status, request_from(request), method, layers, ranks,
                       json.loads(report), segment)
            )  # fmt: skip
        return found

    def _known(self) -> str:
        newest = self.newest()
        return f"edits 1 to {newest} are known" if newest else "it has no edits yet"

    def _held(self, edit: int) -> Held:
        """One query for all that reading an edit takes; raises ValueError where nothing is kept."""
        row = self.db.execute(
            "SELECT shifts, memory, file, start, length, sha256 FROM edits "
            "JOIN segments ON segments.id = segment WHERE edits.id = ?", (edit,),
        ).fetchone()  # fmt: skip
        if row is None:
            status = self.record(edit).status
            raise ValueError(f"edit {edit} is {status}: its factors are no longer kept")
        shifts, memory, file, *place = row
        layers = [(self._ordered[position], rank) for position, rank in json.loads(shifts)]
        specs = factor_specs(edit, layers)
        for name, dtype, shape in json.loads(memory):
            specs.append(files.Spec(f"{edit}/memory/{name}", dtype, tuple(shape)))
        names = [module.name for module, _ in layers]
        return Held(names, specs, self.directory / "segments" / file, files.Range(*place))

    @cached_property
    def _ordered(self) -> list[ModuleInfo]:
        return list(self.modules.values())

    def specs(self, edit: int) -> list[files.Spec]:
        """The tensors of one edit in its file, in order."""
        return self._held(edit).specs

    def part(self, edit: int) -> bytearray:
        """The bytes of one edit's part, checked; raises as ``shifts``."""
        return self._read(edit, self._held(edit))

    def _read(self, edit: int, held: Held) -> bytearray:
        try:
            return files.read(held.path, held.place)
        except DamagedError as error:
            again = self._held(edit)
            if again.path != held.path:  # a compaction moved it meanwhile
                return files.read(again.path, again.place)
            raise error.about((edit,), DAMAGED_SEGMENT) from error


@dataclass(frozen=True)
class Held:
    """The place of one edit's tensors. names: of its modules, two tensors of each come first."""

    names: list[str]
    specs: list[files.Spec]
    path: Path
    place: files.Range


def parts_json(parts, ranges) -> str:
    """Parts with one tensor each, for the files that are not segments."""
    return json.dumps(
        [[s.name, s.dtype, s.shape, r.start, r.length, r.sha256]
         for part, r in zip(parts, ranges, strict=True) for s in part.specs]
    )  # fmt: skip


def parts_from(text: str) -> list[tuple[list[files.Spec], files.Range]]:
    """The inverse of ``parts_json``."""
    return [
        ([files.Spec(name, dtype, tuple(shape))], files.Range(start, length, sha256))
        for name, dtype, shape, start, length, sha256 in json.loads(text)
    ]
