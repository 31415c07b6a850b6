"""Snapshots of the accumulators: what makes reopening and reverting quick, and folding possible.

A snapshot is the sum of the edits in effect up to an id, with a digest of which those are. It may
stand for them exactly while the digest fits: reverting one of them makes it useless, restoring that
one makes it good again.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hiedit.ledger import files
from hiedit.ledger.accumulate import accumulate_
from hiedit.ledger.errors import DamagedError, storage
from hiedit.ledger.fingerprint import ModuleInfo
from hiedit.ledger.reader import Reader, parts_from, parts_json
from hiedit.ledger.records import merged
from hiedit.ledger.schema import now
from hiedit.ledger.store import Store
from hiedit.types import Shifts

# A snapshot is due when replaying the edits since the last one takes several times as long as
# writing and reading one: a core does some 5e9 multiply-adds a second, a disk and SHA-256 together
# move some 5e8 bytes, so 2 x 4 bytes per element are worth 80 multiply-adds. Few edits never are:
# writing a snapshot per edit would cost more than anything that it saves.
WORK_PER_ELEMENT = 256
FEWEST_EDITS = 64
KEPT = 5  # beside the one that folded edits need; spread by age, for reverting old edits

FOLDED_AWAY = (
    "the edits before it were folded into it, so nothing can stand in for it: put the file back "
    "from a copy of the ledger"
)


@dataclass(frozen=True)
class Snapshot:
    """One row of the table. required: folded edits exist in it alone."""

    id: int
    upto: int
    required: bool
    path: Path
    bytes: int
    header: str
    parts: list


def digest(reader: Reader, upto: int) -> str:
    """Digest the set of edits in effect up to ``upto``: equivalently, of those that are not."""
    query = "SELECT id FROM edits WHERE status IN ('reverted', 'dropped') AND id <= ? ORDER BY id"
    absent = [edit for (edit,) in reader.db.execute(query, (upto,))]
    return hashlib.sha256(json.dumps([upto, absent]).encode()).hexdigest()


def valid(reader: Reader) -> list[Snapshot]:
    """Those that stand for the edits now in effect up to their id, newest first."""
    query = """SELECT digest, id, upto, required, file, bytes, header, parts FROM snapshots
               ORDER BY upto DESC, id DESC"""
    folder = reader.directory / "snapshots"
    return [
        Snapshot(i, upto, bool(required), folder / file, size, header, parts_from(parts))
        for found, i, upto, required, file, size, header, parts in reader.db.execute(query)
        if required or found == digest(reader, upto)
    ]


def load(snapshot: Snapshot, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The accumulators by module name, fp32, as stored. Raises DamagedError."""
    found = {}
    for specs, place in snapshot.parts:
        if names is None or specs[0].name in names:
            found |= files.tensors(specs, files.read(snapshot.path, place))
    return found


def start(reader: Reader, below: int | None = None, names: Collection[str] | None = None):
    """Return where a replay may begin: (upto, accumulators) of the newest valid snapshot with
    ``upto < below``, or (0, {}) without one. A damaged one is named in a warning and passed over.

    Raises:
        DamagedError: if it is the one that folded edits need.
    """
    for snapshot in valid(reader):
        if below is not None and snapshot.upto >= below:
            continue
        try:
            return snapshot.upto, load(snapshot, names)
        except DamagedError as error:
            if snapshot.required:
                raise error.about((), FOLDED_AWAY) from error
            warnings.warn(f"{error}; its edits are replayed instead", RuntimeWarning, stacklevel=3)
    return 0, {}


def add(acc: dict[str, Tensor], modules: Mapping[str, ModuleInfo], stream: Iterable[Shifts]):
    """Accumulates shifts in order onto ``acc``, a scratch copy that no model sees."""
    for shifts in merged(stream):
        for name, shift in shifts.items():
            module = modules[name]
            if name not in acc:
                acc[name] = torch.zeros(module.rows, module.columns)
            accumulate_(acc[name], shift.A, shift.B, conv1d=module.conv1d)
    return acc


def tail(reader: Reader) -> tuple[int, int]:
    """Edits since the newest valid snapshot, and the multiply-adds that their replay takes."""
    newest = max((s.upto for s in valid(reader)), default=0)
    query = "SELECT count(*), total(work) FROM edits WHERE id > ? AND status = 'active'"
    count, work = reader.db.execute(query, (newest,)).fetchone()
    return count, int(work)


def due(edits: int, work: int, elements: int, closing: bool = False) -> bool:
    """Tell whether a snapshot is worth its cost; when closing, a quarter of the work is enough."""
    enough = WORK_PER_ELEMENT * elements // (4 if closing else 1)
    return edits >= FEWEST_EDITS and work >= enough > 0


def save(store: Store, upto: int, acc: Mapping[str, Tensor]) -> None:
    """Stores the accumulators ``acc`` as those of the edits in effect up to ``upto``.

    Raises:
        LedgerError: if they could not be stored.
    """
    store.lock.check()
    with storage("snapshot", store.directory):
        written, parts = write(store, upto, acc)
        with store.transaction(store.directory / "snapshots" / written.file):
            insert(store, upto, written, parts, required=False)
            store.log("snapshot", [upto])
            gone = thin(store, KEPT)
        files.remove(*gone)


def write(store: Store, upto: int, acc: Mapping[str, Tensor]) -> tuple[files.Written, list]:
    """The file of a snapshot, not yet recorded, and its parts."""
    parts = [files.Part.of({name: acc[name]}) for name in store.modules if name in acc]
    return files.write(store.directory / "snapshots", f"{upto:08d}", parts), parts


def insert(store: Store, upto: int, written: files.Written, parts: list, required: bool) -> None:
    """The row of a snapshot, inside a transaction."""
    store.db.execute(
        "INSERT INTO snapshots (upto, digest, required, created, file, bytes, header, parts) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (upto, digest(store, upto), required, now(), written.file, written.bytes, written.header,
         parts_json(parts, written.parts)),
    )  # fmt: skip


def thin(store: Store, keep: int) -> list[Path]:
    """Removes the rows of all but ``keep`` valid snapshots (and the required one), inside a
    transaction; returns the files to be removed after it.

    The newest two stay; of the others, the one goes whose neighbours are closest in age, as a
    ratio: those that stay are spread over the logarithm of their age, so that reverting an edit
    replays a modest multiple of the edits since it.
    """
    kept = list({s.upto: s for s in reversed(valid(store)) if not s.required}.values())[::-1]
    while len(kept) > keep:
        if len(kept) <= 2:
            kept.pop()
            continue
        ages = [kept[0].upto - upto + 1 for upto in (*(s.upto for s in kept), 0)]
        gap = {i: ages[i + 1] / ages[i - 1] for i in range(min(2, len(kept) - 1), len(kept))}
        kept.pop(min(gap, key=gap.get))
    ids = {s.id for s in kept}
    rows = store.db.execute("SELECT id, file FROM snapshots WHERE NOT required").fetchall()
    gone = [(i, file) for i, file in rows if i not in ids]
    store.db.executemany("DELETE FROM snapshots WHERE id = ?", [(i,) for i, _ in gone])
    return [store.directory / "snapshots" / file for _, file in gone]
