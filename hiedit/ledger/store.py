"""Writing a ledger: every change is one transaction, and on disk when the call returns.

    factors -> file -> fsync -> rename -> fsync of the directory -> transaction -> acknowledged

A crash before the transaction leaves a file without a record, which the next writer removes; after
it, the edit is there whole.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from hiedit.durable import sync
from hiedit.ledger import files, schema
from hiedit.ledger.errors import storage
from hiedit.ledger.fingerprint import describe
from hiedit.ledger.lock import WriterLock
from hiedit.ledger.reader import Reader, parts_json
from hiedit.ledger.records import (
    Entry,
    baked,
    factor_specs,
    report_json,
    request_json,
)
from hiedit.ledger.schema import now
from hiedit.provenance import digest
from hiedit.types import Shift

if TYPE_CHECKING:  # it would load transformers, and reading a ledger needs none
    from hiedit.backbone.modules import EditableModule

_EMPTY = "NOT EXISTS (SELECT 1 FROM edits WHERE edits.segment = segments.id)"
_EDIT = "INSERT INTO edits VALUES (?, ?, 'active', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"


class Store(Reader):
    """The one writer of a ledger; holds no model.

    Args:
        directory: of the ledger; made if it is not there.
        modules: of the base model, to begin a ledger or to be compared with those it was begun
            with. None opens an existing one without a model.

    Raises:
        LedgerLocked: if another process writes, naming it.
        LedgerError: if the format is a later one, or the directory cannot be written.
        ValueError: for another base model, or without ``modules`` where there is no ledger.
    """

    def __init__(self, directory: Path, modules: Mapping[str, EditableModule] | None):
        self._leftover: list[Path] = []
        if modules is None:
            Reader(directory, None).close()  # says where there is none, before making anything
        with storage("open", directory):
            new = not directory.exists()
            for folder in (directory, *(directory / name for name in schema.FOLDERS)):
                folder.mkdir(parents=True, exist_ok=True)
            if new:
                sync(directory.parent)
            self.lock = WriterLock(directory / "lock")
        try:
            with storage("open", directory):
                self._open(directory, modules)
        except BaseException:
            self.lock.release()
            raise

    def _open(self, directory: Path, modules: Mapping[str, EditableModule] | None) -> None:
        db = schema.connect(directory)
        try:
            super().__init__(directory, (db, db.close))
            if schema.exists(db):
                schema.check_format(db, directory)
                if modules is not None:
                    describe(modules, list(self.modules.values()))
            else:
                schema.create(db, describe(modules or {}))
                sync(directory)
            self.sweep()
        except BaseException:
            db.close()
            raise

    def close(self) -> None:
        """Gives the lock back; what is acknowledged is on disk already."""
        super().close()
        self.lock.release()

    def sweep(self) -> None:
        """Removes what a crash, a failed write or a fold left: files without record or edits."""
        if self.db.execute(f"SELECT 1 FROM segments WHERE {_EMPTY}").fetchone():
            with self.transaction():
                self.drop_empty_segments()
        for folder in schema.FOLDERS:
            known = {file for (file,) in self.db.execute(f"SELECT file FROM {folder}")}
            files.remove(*files.strays(self.directory / folder, known))

    def bake(self, entries: Sequence[Entry]) -> list[dict[str, Shift]]:
        """The entries' shifts as stored; raises ValueError for one that cannot be, naming it."""
        found = []
        for entry in entries:
            if not isinstance(entry, Entry):
                raise ValueError(f"commit takes hiedit.ledger.Entry, got {type(entry).__name__}")
            what = f"edit {entry.request.prompt!r}"
            found.append(baked(entry.shifts, self.modules, what))
            report_json(entry.report)
            for name, tensor in entry.memory.items():
                files.Spec.of(f"memory/{name}", tensor)
        return found

    def append(self, entries: Sequence[Entry], shifts: Sequence[dict[str, Shift]]) -> list[int]:
        """Stores a group of edits, all or none; ``shifts`` are theirs, baked.

        Returns:
            Their ids, once they are on disk.

        Raises:
            LedgerError: if they could not be stored; nothing was changed then.
        """
        self.lock.check()
        with storage("commit", self.directory):
            first = self.newest() + 1
            ids = list(range(first, first + len(entries)))
            groups = list(zip(ids, entries, shifts, strict=True))
            parts = [self._part(*group) for group in groups]
            folder = self.directory / "segments"
            written = files.write(folder, f"{first:08d}", parts)
            with self.transaction(folder / written.file):
                segment = self.insert_segment(written)
                self.db.executemany(
                    _EDIT,
                    [(*self._row(*group), segment, r.start, r.length, r.sha256)
                     for group, r in zip(groups, written.parts, strict=True)],
                )  # fmt: skip
                self.log("commit", ids)
        return ids

    def set_status(self, what: str, ids: Sequence[int], old: str, new: str) -> None:
        """Turns the edits ``ids`` from ``old`` to ``new`` in one transaction; see ``check``.

        Raises:
            LedgerError: if that could not be stored; nothing was changed then.
        """
        self.lock.check()
        with storage(what, self.directory), self.transaction():
            for edit in ids:
                self.db.execute(
                    "UPDATE edits SET status = ? WHERE id = ? AND status = ?", (new, edit, old)
                )
            self.log(what, ids)

    def check(self, what: str, ids: Iterable[int], old: str) -> list[int]:
        """``ids`` sorted and without repetition, if every one of them has the status ``old``.

        Raises:
            ValueError: naming the first that does not, or is not known, and why.
        """
        ids = list(ids)
        for edit in ids:
            if isinstance(edit, bool) or not isinstance(edit, int):
                raise ValueError(f"{what}: {edit!r} is not the id of an edit: ids are integers")
        ids = sorted(set(ids))
        for edit in ids:
            row = self.db.execute("SELECT status FROM edits WHERE id = ?", (edit,)).fetchone()
            if row is None:
                raise ValueError(f"{what}: there is no edit {edit}: {self._known()}")
            if row[0] != old:
                raise ValueError(f"{what}: edit {edit} is {row[0]}: {_EXPLAINED[what, row[0]]}")
        return ids

    def save_attachment(
        self, name: str, upto: int, tensors: Mapping[str, Tensor], tag: str
    ) -> None:
        """Stores state of the editor beside the edits; the newest under a name is kept.

        Args:
            name: letters, digits, ``_`` and ``-``.
            upto: the last edit that the state takes account of.
            tensors: by name, of the dtypes in ``files.DTYPES``.
            tag: what must match when it is loaded, for example a version or a digest of settings.

        Raises:
            ValueError: for a name or a dtype that cannot be stored.
            LedgerError: if it could not be stored; the previous one is kept then.
        """
        self.lock.check()
        if not name or not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
            raise ValueError(f"attachment {name!r}: use letters, digits, '_' and '-'")
        parts = [files.Part.of({key: tensor}) for key, tensor in tensors.items()]
        with storage(f"attachment {name!r}", self.directory):
            old = self.db.execute("SELECT file FROM attachments WHERE name = ?", (name,)).fetchone()
            folder = self.directory / "attachments"
            written = files.write(folder, name, parts)
            with self.transaction(folder / written.file):
                self.db.execute(
                    "INSERT OR REPLACE INTO attachments VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (name, upto, tag, now(), written.file, written.bytes, written.header,
                     parts_json(parts, written.parts)),
                )  # fmt: skip
        if old:
            files.remove(folder / old[0])

    @contextlib.contextmanager
    def transaction(self, made: Path | None = None) -> Iterator[None]:
        """Do as ``schema.transaction``; ``made`` is a new file, removed if it came to nothing.

        After a COMMIT that failed the file stays until a later transaction has succeeded.
        """
        try:
            with schema.transaction(self.db):
                yield
        except BaseException as error:
            if made and isinstance(error, schema.CommitError):
                self._leftover.append(made)
            elif made:
                files.remove(made)
            raise
        files.remove(*self._leftover)
        self._leftover.clear()

    def log(self, what: str, ids: Collection[int]) -> None:
        """Adds an event, inside the transaction of what it records."""
        values = (now(), what, json.dumps(list(ids)))
        self.db.execute("INSERT INTO events (time, what, ids) VALUES (?, ?, ?)", values)

    def insert_segment(self, written: files.Written) -> int:
        """The row of a new segment, inside the transaction; returns its id."""
        values = (written.file, written.bytes, written.header)
        query = "INSERT INTO segments (file, bytes, header) VALUES (?, ?, ?)"
        return self.db.execute(query, values).lastrowid

    def drop_empty_segments(self) -> list[Path]:
        """Deletes the rows of segments without edits, inside a transaction; returns their files."""
        rows = self.db.execute(f"SELECT file FROM segments WHERE {_EMPTY}").fetchall()
        self.db.execute(f"DELETE FROM segments WHERE {_EMPTY}")
        return [self.directory / "segments" / file for (file,) in rows]

    def _part(self, edit: int, entry: Entry, shifts: Mapping[str, Shift]) -> files.Part:
        factors = [t for shift in shifts.values() for t in (shift.A, shift.B)]
        specs = factor_specs(edit, [(self.modules[n], s.rank) for n, s in shifts.items()])
        kept = [files.Spec.of(f"{edit}/memory/{n}", t) for n, t in entry.memory.items()]
        held = [*factors, *entry.memory.values()]
        return files.Part(specs + kept, lambda: map(files.raw, held))

    def _row(self, edit: int, entry: Entry, shifts: Mapping[str, Shift]) -> tuple:
        """The columns of an edit before those that say where its factors are."""
        position = {name: i for i, name in enumerate(self.modules)}
        ranks = [[position[name], shift.rank] for name, shift in shifts.items()]
        kept = [(name, files.NAMES[t.dtype], t.shape) for name, t in entry.memory.items()]
        return (
            edit, now(), digest(entry.request.prompt), request_json(entry.request), entry.method,
            report_json(entry.report), json.dumps(ranks), json.dumps(kept),
            sum(shift.rank * self.modules[name].elements for name, shift in shifts.items()),
        )  # fmt: skip


_EXPLAINED = {
    ("revert", "reverted"): "it is reverted already",
    ("restore", "active"): "it is in effect already",
    **{
        (what, status): explained
        for what in ("revert", "restore")
        for status, explained in {
            "folded": "a compaction folded it into the base snapshot, so it stays in effect",
            "dropped": "its factors were removed for good",
        }.items()
    },
}
