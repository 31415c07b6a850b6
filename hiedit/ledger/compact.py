"""Keeping a ledger small: few large files instead of many small ones, old edits folded away.

Every step writes its new files first, then changes the record in one transaction, then deletes what
nothing refers to any more: it may be cut off anywhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from hiedit.ledger import files, snapshots
from hiedit.ledger.errors import DamagedError, storage
from hiedit.ledger.records import ACTIVE, DROPPED, FOLDED, REVERTED
from hiedit.ledger.store import Store

PACK_BYTES = 64 << 20
PACK_EDITS = 4096  # bounds the header of a pack


@dataclass(frozen=True)
class Compaction:
    """The result of a compaction.

    bytes_before, bytes_after: size of the ledger on disk.
    segments_before, segments_after: number of files that hold factors.
    folded: ids of active edits that are now in effect for good.
    dropped: ids of reverted edits that are now gone for good.
    """

    bytes_before: int
    bytes_after: int
    segments_before: int
    segments_after: int
    folded: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()


def compact(store: Store, keep: int | None = None) -> Compaction:
    """See ``Ledger.compact``."""
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 0):
        raise ValueError(f"compact: keep is {keep!r}: it must be a number of edits, 0 or more")
    size, count = store.bytes(), _segments(store)
    with storage("compact", store.directory):
        with store.transaction():  # first: after it, files that a failed COMMIT left may go
            store.log("compact", [])
        folded, dropped = _fold(store, keep) if keep is not None else ((), ())
        store.sweep()
        for pack in list(_plan(store)):
            _repack(store, pack)
        with store.transaction():
            gone = snapshots.thin(store, keep=1)
        files.remove(*gone)
        store.db.execute("VACUUM")
        store.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return Compaction(size, store.bytes(), count, _segments(store), folded, dropped)


def _segments(store: Store) -> int:
    return store.db.execute("SELECT count(*) FROM segments").fetchone()[0]


def _fold(store: Store, keep: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Makes a snapshot the only place of all but the newest ``keep`` edits."""
    row = store.db.execute(
        "SELECT id FROM edits ORDER BY id DESC LIMIT 1 OFFSET ?", (keep,)
    ).fetchone()  # fmt: skip
    cut = row[0] if row else 0
    folded, dropped = (
        tuple(i for (i,) in store.db.execute(
            "SELECT id FROM edits WHERE id <= ? AND status = ? ORDER BY id", (cut, status)))
        for status in (ACTIVE, REVERTED)
    )  # fmt: skip
    if not folded and not dropped:
        return (), ()
    upto, acc = snapshots.start(store, below=cut + 1)
    snapshots.add(acc, store.modules, store.active(upto, cut))
    written, parts = snapshots.write(store, cut, acc)
    with store.transaction(store.directory / "snapshots" / written.file):
        for old, new in ((ACTIVE, FOLDED), (REVERTED, DROPPED)):
            store.db.execute(
                "UPDATE edits SET status = ?, segment = NULL, start = NULL, length = NULL, "
                "sha256 = NULL WHERE id <= ? AND status = ?", (new, cut, old),
            )  # fmt: skip
        old = store.db.execute("SELECT file FROM snapshots WHERE upto <= ?", (cut,)).fetchall()
        store.db.execute("DELETE FROM snapshots WHERE upto <= ?", (cut,))
        snapshots.insert(store, cut, written, parts, required=True)
        store.log("fold", folded)
        store.log("drop", dropped)
    files.remove(*(store.directory / "snapshots" / file for (file,) in old))
    return folded, dropped


def _plan(store: Store) -> Iterator[list[int]]:
    """Groups of edits, in order, each to become one file; large files without waste stay."""
    rows = store.db.execute(
        "SELECT edits.id, segment, length, bytes FROM edits JOIN segments "
        "ON segments.id = segment ORDER BY edits.id"
    ).fetchall()
    inside: dict[int, list[int]] = {}
    for edit, segment, _, _ in rows:
        inside.setdefault(segment, []).append(edit)
    tight: dict[int, bool] = {}
    pack, size, sources = [], 0, set()
    for edit, segment, length, whole in rows:
        if whole >= PACK_BYTES // 2 and segment not in tight:
            tight[segment] = _tight(store, whole, inside[segment])
        if tight.get(segment):
            continue
        if pack and (size + length > PACK_BYTES or len(pack) == PACK_EDITS):
            yield pack
            pack, size, sources = [], 0, set()
        pack.append(edit)
        sources.add((segment, whole))
        size += length
    alone = len(sources) == 1 and all(_tight(store, size, inside[s]) for s, size in sources)
    if pack and not alone:
        yield pack


def _tight(store: Store, size: int, edits: list[int]) -> bool:
    """Tell whether a segment of this size holds nothing but these edits."""
    specs = [store.specs(edit) for edit in edits]
    content = sum(spec.bytes for part in specs for spec in part)
    return size == content + len(files.header_of(specs))


def _repack(store: Store, edits: list[int]) -> None:
    """Moves the parts of ``edits`` to a new file, byte for byte."""
    parts = [
        files.Part(store.specs(edit), lambda edit=edit: [store.part(edit)]) for edit in edits
    ]  # fmt: skip
    folder = store.directory / "segments"
    try:
        written = files.write(folder, f"{edits[0]:08d}-{edits[-1]:08d}", parts)
    except DamagedError as error:
        warnings.warn(f"{error}; its neighbours stay as they are", RuntimeWarning, stacklevel=4)
        return
    with store.transaction(folder / written.file):
        segment = store.insert_segment(written)
        store.db.executemany(
            "UPDATE edits SET segment = ?, start = ?, length = ? WHERE id = ? AND sha256 = ?",
            [(segment, r.start, r.length, edit, r.sha256)
             for edit, r in zip(edits, written.parts, strict=True)],
        )  # fmt: skip
        gone = store.drop_empty_segments()
    files.remove(*gone)
