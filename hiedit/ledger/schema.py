"""The SQLite part of a ledger: tables, version, connections, transactions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from hiedit.ledger.errors import DamagedError, LedgerError, unreadable
from hiedit.ledger.fingerprint import ModuleInfo

FORMAT = 1
DATABASE = "ledger.db"
FOLDERS = ("segments", "snapshots", "attachments")

# ids are the canonical order of the edits. An edit's factors are the bytes [start, start + length)
# of its segment; `shifts` is JSON [[position of the module, rank], ...], `memory` JSON [[name,
# dtype, shape], ...]. `work` is the number of multiply-adds that a replay of the edit takes.
TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE modules (
  position INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, rows INTEGER NOT NULL,
  columns INTEGER NOT NULL, conv1d INTEGER NOT NULL, dtype TEXT NOT NULL, sha256 TEXT NOT NULL);
CREATE TABLE segments (
  id INTEGER PRIMARY KEY, file TEXT NOT NULL UNIQUE, bytes INTEGER NOT NULL, header TEXT NOT NULL);
CREATE TABLE edits (
  id INTEGER PRIMARY KEY, created TEXT NOT NULL,
  status TEXT NOT NULL CHECK (status IN ('active', 'reverted', 'folded', 'dropped')),
  prompt TEXT NOT NULL, request TEXT NOT NULL, method TEXT NOT NULL, report TEXT NOT NULL,
  shifts TEXT NOT NULL, memory TEXT NOT NULL, work INTEGER NOT NULL,
  segment INTEGER REFERENCES segments (id), start INTEGER, length INTEGER, sha256 TEXT);
CREATE INDEX edits_by_prompt ON edits (prompt);
CREATE INDEX edits_by_segment ON edits (segment);
CREATE INDEX edits_not_in_effect ON edits (id) WHERE status IN ('reverted', 'dropped');
CREATE TABLE snapshots (
  id INTEGER PRIMARY KEY, upto INTEGER NOT NULL, digest TEXT NOT NULL, required INTEGER NOT NULL,
  created TEXT NOT NULL, file TEXT NOT NULL UNIQUE, bytes INTEGER NOT NULL, header TEXT NOT NULL,
  parts TEXT NOT NULL);
CREATE TABLE attachments (
  name TEXT PRIMARY KEY, upto INTEGER NOT NULL, tag TEXT NOT NULL, created TEXT NOT NULL,
  file TEXT NOT NULL UNIQUE, bytes INTEGER NOT NULL, header TEXT NOT NULL, parts TEXT NOT NULL);
CREATE TABLE events (
  id INTEGER PRIMARY KEY, time TEXT NOT NULL, what TEXT NOT NULL, ids TEXT NOT NULL);
"""


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def connect(directory: Path) -> sqlite3.Connection:
    """Connect the one writer; transactions are explicit, and on disk when they are committed."""
    db = sqlite3.connect(
        directory / DATABASE, timeout=30, isolation_level=None, check_same_thread=False
    )
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        db.close()
        raise
    return db


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All or nothing. What fails inside is rolled back, then raised.

    Raises:
        CommitError: if the final COMMIT failed. Nothing was changed then either, but where the
            process is killed before the next transaction, a recovery may still find this one whole:
            files that it refers to must stay until then.
    """
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        _roll_back(db)
        raise
    try:
        db.execute("COMMIT")
    except sqlite3.Error as error:
        _roll_back(db)
        raise CommitError(*error.args) from error


class CommitError(sqlite3.Error):
    """The COMMIT of a transaction failed."""


def _roll_back(db: sqlite3.Connection) -> None:
    if db.in_transaction:  # some errors roll back by themselves
        db.execute("ROLLBACK")


def create(db: sqlite3.Connection, modules: Sequence[ModuleInfo]) -> None:
    """Makes the tables, in one transaction: a ledger is there whole or not at all."""
    rows = [(i, m.name, m.rows, m.columns, m.conv1d, m.dtype, m.sha256) for i, m in
            enumerate(modules)]  # fmt: skip
    meta = {"format": str(FORMAT), "created": now(), "hiedit": _version()}
    with transaction(db):
        for statement in filter(str.strip, TABLES.split(";")):
            db.execute(statement)
        db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        db.executemany("INSERT INTO modules VALUES (?, ?, ?, ?, ?, ?, ?)", rows)


def _version() -> str:
    try:
        return importlib.metadata.version("hiedit")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def exists(db: sqlite3.Connection) -> bool:
    return bool(db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone())


def check_format(db: sqlite3.Connection, directory: Path) -> None:
    """Raises LedgerError for a ledger of a later format, naming both versions."""
    meta = dict(db.execute("SELECT key, value FROM meta"))
    if not meta["format"].isdecimal() or int(meta["format"]) > FORMAT:
        raise LedgerError(
            f"the ledger in {directory} has format {meta['format']} (written by hiedit "
            f"{meta.get('hiedit', 'unknown')}); this hiedit {_version()} knows formats up to "
            f"{FORMAT}: use a later hiedit"
        )


def connect_to_read(directory: Path) -> tuple[sqlite3.Connection, Callable[[], None]]:
    """A connection that cannot write, and what closes it.

    A database in WAL mode needs two small files beside it even to be read. Where they are missing
    and cannot be made, in a directory that this user may only read, nobody is writing: a private
    copy of the database is read instead.

    Raises:
        ValueError: if there is no ledger in ``directory``.
    """
    path = directory / DATABASE
    if not path.is_file():
        raise ValueError(
            f"no ledger in {directory}: it has no {DATABASE}; give the directory that the edits "
            "were committed to"
        )
    try:
        db = _read_only(path)
        close = db.close
    except sqlite3.DatabaseError as error:
        if unreadable(error):
            raise DamagedError(path, str(error)) from error
        copy = tempfile.TemporaryDirectory(prefix="hiedit-ledger-")
        _copy_quiet(directory, Path(copy.name))
        db = _read_only(Path(copy.name) / DATABASE)

        def close():
            db.close()
            copy.cleanup()

    try:
        if not exists(db):
            raise ValueError(f"no ledger in {directory}: its {DATABASE} is empty")
        check_format(db, directory)
    except BaseException:
        close()
        raise
    return db, close


def _read_only(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=30, isolation_level=None,
        check_same_thread=False,
    )  # fmt: skip
    try:
        db.execute("SELECT count(*) FROM sqlite_master")
    except BaseException:
        db.close()
        raise
    return db


def _copy_quiet(source: Path, target: Path) -> None:
    """Copies database and log; again if a writer that has just begun changed them meanwhile."""
    names = (DATABASE, f"{DATABASE}-wal")

    def stamps():
        return [((source / n).stat().st_mtime_ns, (source / n).stat().st_size)
                for n in names if (source / n).exists()]  # fmt: skip

    for _ in range(20):
        before = stamps()
        for name in names:
            (target / name).unlink(missing_ok=True)
            if (source / name).exists():
                shutil.copyfile(source / name, target / name)
        if stamps() == before:
            return
        time.sleep(0.05)
    raise LedgerError(f"the ledger in {source} is being written and could not be read; try again")
