"""Reading every byte of a ledger again, and giving up what is damaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hiedit.ledger import files, snapshots
from hiedit.ledger.errors import DamagedError, storage
from hiedit.ledger.reader import Reader, parts_from
from hiedit.ledger.records import DROPPED
from hiedit.ledger.store import Store


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be. file: its path; ids: the edits that it concerns."""

    file: Path
    ids: tuple[int, ...]
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}" + (f" (edits {self.ids})" if self.ids else "")


@dataclass(frozen=True)
class Verification:
    """Counts of what was read, and what was wrong."""

    edits: int
    segments: int
    snapshots: int
    attachments: int
    bytes: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(reader: Reader, acc: Mapping[str, Tensor] | None = None) -> Verification:
    """Checks every file and every checksum, and that every snapshot is what a replay gives.

    Takes the memory of one set of accumulators, and the time of a replay of all edits.

    Args:
        acc: accumulators in memory that should have the bits of the replay as well.
    """
    integrity = reader.db.execute("PRAGMA integrity_check").fetchone()[0]
    database = reader.directory / "ledger.db"
    problems = [] if integrity == "ok" else [Problem(database, (), integrity)]
    segments = reader.db.execute("SELECT id, file, bytes, header FROM segments").fetchall()
    damaged: set[int] = set()
    for segment, file, size, header in segments:
        found = _segment_problems(reader, segment, file, size, header)
        problems += found
        damaged.update(edit for problem in found for edit in problem.ids)
    lost = "SELECT id FROM edits WHERE segment IS NULL AND status IN ('active', 'reverted')"
    problems += [Problem(database, row, "no file is recorded") for row in reader.db.execute(lost)]
    problems += _snapshot_problems(reader, acc, damaged)
    attachments = reader.db.execute("SELECT file, bytes, header, parts FROM attachments").fetchall()
    for file, size, header, parts in attachments:
        path = reader.directory / "attachments" / file
        problems += _damage(path, size, header, parts_from(parts))

    def count(table):
        return reader.db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]

    return Verification(
        count("edits"), len(segments), count("snapshots"), len(attachments), reader.bytes(),
        tuple(problems),
    )  # fmt: skip


def _segment_problems(reader: Reader, segment: int, file: str, size: int, header: str):
    """Check one segment: its header, then every edit in it."""
    path, problems = reader.directory / "segments" / file, []
    query = "SELECT id FROM edits WHERE segment = ? ORDER BY start"
    ids = tuple(edit for (edit,) in reader.db.execute(query, (segment,)))
    for edit in ids:
        try:
            tensors = files.tensors(reader.specs(edit), reader.part(edit))
            factors = [t for name, t in tensors.items() if not name.startswith(f"{edit}/memory/")]
            if not all(bool(t.isfinite().all()) for t in factors):
                problems.append(Problem(path, (edit,), "a factor is not finite"))
        except DamagedError as error:
            problems.append(Problem(error.file, (edit,), error.reason))
    if not problems:
        try:
            files.check_header(path, size, header)
        except DamagedError as error:
            problems.append(Problem(path, (), error.reason))
    return problems


def _snapshot_problems(reader: Reader, acc, damaged: set[int]) -> list[Problem]:
    """Check every valid snapshot, oldest first: its file, then its bits against a replay."""
    problems, replayed, at = [], {}, 0
    for snapshot in reversed(snapshots.valid(reader)):
        found = _damage(snapshot.path, snapshot.bytes, snapshot.header, snapshot.parts)
        problems += found
        if snapshot.required:
            if found:
                return problems  # nothing to replay from
            replayed, at = snapshots.load(snapshot), snapshot.upto
        elif not any(edit <= snapshot.upto for edit in damaged):
            snapshots.add(replayed, reader.modules, reader.active(at, snapshot.upto))
            at = max(at, snapshot.upto)
            if not found and not same_bits(snapshots.load(snapshot), replayed):
                problems.append(Problem(snapshot.path, (), "it is not what its edits add up to"))
    if acc is not None and not damaged:
        snapshots.add(replayed, reader.modules, reader.active(at))
        if not same_bits(acc, replayed):
            problems.append(
                Problem(reader.directory, (), "the model in memory is not the ledger's")
            )
    return problems


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Tell whether two sets of accumulators agree in every bit; one that is missing counts as
    zeros."""

    def bits(acc, name):
        return acc[name].cpu().contiguous().view(torch.int32) if name in acc else None

    for name in one.keys() | other.keys():
        pair = [b for b in (bits(one, name), bits(other, name)) if b is not None]
        if not torch.equal(pair[0], pair[1] if len(pair) == 2 else torch.zeros_like(pair[0])):
            return False
    return True


def _damage(path: Path, size: int, header: str, parts: list) -> list[Problem]:
    """Check a file that is no segment: header and checksums."""
    try:
        files.check_header(path, size, header, [specs for specs, _ in parts])
        for _, place in parts:
            files.read(path, place)
    except DamagedError as error:
        return [Problem(path, (), error.reason)]
    return []


def drop_damaged(directory: str | Path) -> tuple[int, ...]:
    """Gives up the edits whose factors are damaged, for good, so that the rest can be opened.

    Their status becomes ``dropped``, also in the history: the weights are then those of the other
    edits, as if the damaged ones had been reverted. Snapshots that are damaged are removed.

    Returns:
        The ids of the edits given up.

    Raises:
        ValueError: if there is no ledger in ``directory``.
        LedgerError: if another process writes to it.
        DamagedError: if the snapshot that folded edits need is damaged; nothing can replace it.
    """
    path = Path(directory).expanduser().absolute()
    with Store(path, None) as store, storage("drop_damaged", path):
        ids = [edit for edit, _, _ in store.layers() if not _readable(store, edit)]
        gone = []
        for snapshot in snapshots.valid(store):
            if _damage(snapshot.path, snapshot.bytes, snapshot.header, snapshot.parts):
                if snapshot.required:
                    damage = DamagedError(snapshot.path, "it is not what was written")
                    raise damage.about((), snapshots.FOLDED_AWAY)
                gone.append(snapshot)
        with store.transaction():
            store.db.executemany(
                "UPDATE edits SET status = ?, segment = NULL WHERE id = ?",
                [(DROPPED, edit) for edit in ids],
            )
            store.db.executemany("DELETE FROM snapshots WHERE id = ?", [(s.id,) for s in gone])
            empty = store.drop_empty_segments()
            store.log("drop", ids)
        files.remove(*empty, *(s.path for s in gone))
    return tuple(ids)


def _readable(store: Store, edit: int) -> bool:
    try:
        store.part(edit)
    except DamagedError:
        return False
    return True
