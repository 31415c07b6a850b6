"""One writer at a time: a lock that dies with its process and names its holder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import weakref
from datetime import UTC, datetime
from pathlib import Path

from hiedit.ledger.errors import LedgerError, LedgerLocked


class WriterLock:
    """An exclusive ``flock`` on ``path``, whose content says who holds it.

    Raises:
        LedgerLocked: if it is held, naming the holder.
    """

    def __init__(self, path: Path):
        self.path, self._descriptor = path, -1
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise LedgerLocked(
                f"the ledger in {path.parent} is being written by {holder(path)}; there is one "
                "writer at a time: wait for it or end it (reading works meanwhile)"
            ) from None
        except BaseException:
            self.release()
            raise
        about = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(sys.argv)[:200],
        }
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(about).encode(), 0)
        _held.add(self)

    def check(self) -> None:
        """Raises LedgerError where the lock is not held, as in a child of the holder."""
        if self._descriptor < 0:
            raise LedgerError(
                f"the ledger in {self.path.parent} is not open for writing here: it was closed, or "
                "opened before this process was forked; open it again"
            )

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self):  # of a ledger that was never closed
        self.release()


def holder(path: Path) -> str:
    """``process 12 on host (command), since ...`` as far as the lock's content tells."""
    try:
        about = json.loads(path.read_text())
        return "process {pid} on {host} ({command}), since {since}".format(**about)
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


# A forked child shares the lock's file description and would go on holding it after the holder is
# gone: a data loader's worker, say. So children let go of it at once.
_held: weakref.WeakSet[WriterLock] = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [lock.release() for lock in list(_held)])
