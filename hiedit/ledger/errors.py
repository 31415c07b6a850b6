"""Errors of a ledger that are no mistakes in the caller's arguments."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path


class LedgerError(RuntimeError):
    """The ledger could not do what was asked; what was acknowledged before is unharmed."""


class NotFiniteError(ValueError):
    """A shift, or what a weight would become with it, is not finite; nothing was changed."""


class LedgerLocked(LedgerError):
    """Another process (or another object of this one) is writing to the ledger."""


class DamagedError(LedgerError):
    """A file of the ledger is missing or not what was written.

    file: its path. ids: the edits whose factors are in the damaged part, where known.
    """

    def __init__(self, file: Path, reason: str, ids: tuple[int, ...] = (), remedy: str = ""):
        edits = f"; it holds edit{'s' * (len(ids) > 1)} {listed(ids)}" if ids else ""
        super().__init__(f"{file} is damaged: {reason}{edits}{remedy and f'; {remedy}'}")
        self.file, self.reason, self.ids = file, reason, ids

    def about(self, ids: tuple[int, ...], remedy: str = "") -> DamagedError:
        """The same damage, with the edits that it concerns and what can be done."""
        return DamagedError(self.file, self.reason, ids, remedy)


def listed(ids, limit: int = 12) -> str:
    """``1, 2, 3``, cut where it would fill a screen."""
    ids = list(ids)
    rest = f" and {len(ids) - limit} more" if len(ids) > limit else ""
    return ", ".join(map(str, ids[:limit])) + rest


def unreadable(error: Exception) -> bool:
    """Tell whether SQLite says that the database itself is damaged."""
    return isinstance(error, sqlite3.DatabaseError) and any(
        words in str(error) for words in ("malformed", "not a database")
    )


@contextlib.contextmanager
def storage(what: str, directory: Path) -> Iterator[None]:
    """Turns an error of the disk or of SQLite into one that says what it means for the ledger."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        if unreadable(error):
            raise DamagedError(directory / "ledger.db", str(error)) from error
        raise LedgerError(
            f"{what}: could not be written to the ledger in {directory} ({error}); nothing was "
            "changed and what was acknowledged earlier is intact. Once the cause is removed (a "
            "full disk, a lost mount, missing permissions) the same call can be made again"
        ) from error
