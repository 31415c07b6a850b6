"""The ledger of a sharded model: rank 0 writes it, every rank commits its own flat range.

rank 0:       factors -> disk -> acknowledged --tell--> weights (its range)
other ranks:  the same factors -----------------told--> weights (their ranges)

The other ranks read the same files, so all ranks are on one machine. No snapshot is written, whose
accumulators no rank holds whole: a later opening in one process makes up for it.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hiedit.ledger import snapshots
from hiedit.ledger.errors import LedgerError, NotFiniteError
from hiedit.ledger.files import raw
from hiedit.ledger.fingerprint import ModuleInfo
from hiedit.ledger.ledger import Ledger
from hiedit.ledger.reader import Reader
from hiedit.ledger.records import ACTIVE, Entry, Record, baked
from hiedit.ledger.state import DeltaState
from hiedit.sharded.modules import ShardedModule
from hiedit.sharded.ranks import Ranks
from hiedit.sharded.saving import collect


def shared_ledger(
    directory: str | Path, state: DeltaState, ranks: Ranks
) -> LeadingLedger | FollowingLedger:
    """Open (or begin) the ledger of a sharded model; every rank has to call it.

    Raises:
        ValueError: as ``Ledger``, or if the ranks are on several machines. On every rank.
        LedgerError: as ``Ledger``; on every rank.
    """
    here = float(int.from_bytes(hashlib.sha256(socket.gethostname().encode()).digest()[:6], "big"))
    if ranks.largest(here) != -ranks.largest(-here):
        raise ValueError(
            f"ledger={str(directory)!r}: the ranks are on several machines, and every one of them "
            "reads the ledger, an SQLite file: start them all on one"
        )
    described = describe_shards(state.modules, ranks)
    if ranks.main:
        return LeadingLedger(directory, state, ranks, described)
    return FollowingLedger(directory, state, ranks)


def describe_shards(modules: Mapping[str, ShardedModule], ranks: Ranks) -> dict[str, ModuleInfo]:
    """Return on rank 0 what ``fingerprint.describe`` finds of a model that is whole; one weight at
    a time is collected. Empty on the others."""
    found = {}
    for name, module in modules.items():
        whole = collect(module.weight, ranks)
        if whole is not None:
            dtype = str(whole.dtype).removeprefix("torch.")
            sha = hashlib.sha256(raw(whole)).hexdigest()
            found[name] = ModuleInfo(name, *whole.shape, module.conv1d, dtype, sha)
    return found


class LeadingLedger(Ledger):
    """Rank 0's. The others follow ``commit``; what changes statuses needs no model: `hiedit revert`
    and `hiedit restore` do it when nobody has the ledger open."""

    def __init__(self, directory, state: DeltaState, ranks: Ranks, described):
        self.ranks, self._told = ranks, False
        try:
            super().__init__(directory, state, described)
        except Exception as error:
            if not self._told:  # the others wait to hear that it is open
                ranks.tell(f"{error}")
            raise

    def _store_edits(self, entries, shifts) -> list[int]:
        try:
            ids = super()._store_edits(entries, shifts)
        except Exception as error:
            self.ranks.tell(json.dumps({"error": f"{error}"}))
            raise
        self.ranks.tell(json.dumps({"ids": ids}))
        return ids

    def _rebuild(self, names, acc, stream) -> None:
        self._told = True
        self.ranks.tell(None)
        super()._rebuild(names, acc, stream)

    def _set(self, what: str, ids: Iterable[int], old: str, new: str) -> list[int]:
        raise ValueError(f"{what}: not while the model is sharded; `hiedit {what}` needs no model")

    def snapshot(self) -> None:
        """Nothing: see the module."""

    def _snapshot_if_due(self, closing: bool = False) -> None:
        pass


class FollowingLedger:
    """The other ranks': reads what rank 0 wrote, commits what it acknowledged, writes nothing."""

    def __init__(self, directory: str | Path, state: DeltaState, ranks: Ranks):
        self.state, self.ranks = state, ranks
        if said := ranks.tell(None):
            raise LedgerError(f"rank 0 could not open the ledger: {said}")
        self._reader = Reader(Path(directory).expanduser().absolute(), None)
        try:
            self._replay()
        except NotFiniteError:
            ranks.tell(None)  # rank 0 has undone the last change
            self._replay()

    def commit(self, entries: Iterable[Entry]) -> list[int]:
        """Do as ``Ledger.commit``, of the same entries as rank 0's; returns the ids it gave."""
        entries, modules = list(entries), self._reader.modules
        shifts = [baked(e.shifts, modules, f"edit {e.request.prompt!r}") for e in entries]
        if not entries:
            return []
        said = json.loads(self.ranks.tell(None))
        if "error" in said:
            raise LedgerError(said["error"])
        ids = said["ids"]
        try:
            for one in shifts:
                self.state.commit(one)
        except ValueError:
            names = {name for one in shifts for name in one}
            self.ranks.tell(None)  # rank 0 has taken them back
            upto, acc = snapshots.start(self._reader, below=ids[0], names=names)
            self._rebuild(names, acc, self._reader.active(upto))
            raise
        return ids

    def history(self) -> list[Record]:
        return self._reader.history()

    def record(self, edit: int) -> Record:
        return self._reader.record(edit)

    def find(self, prompt: str) -> list[Record]:
        return self._reader.find(prompt)

    def shifts(self, edit: int):
        return self._reader.shifts(edit)

    def memory(self, edit: int) -> dict[str, Tensor]:
        return self._reader.memory(edit)

    def load_attachment(self, name: str, tag: str):
        return self._reader.load_attachment(name, tag)

    def save_attachment(self, *_: Any) -> None:
        """Nothing: rank 0 does."""

    def close(self) -> None:
        self._reader.close()

    def _replay(self) -> None:
        """Do as ``Ledger._replay``."""
        upto, acc = snapshots.start(self._reader)
        active = (layers for _, status, layers in self._reader.layers(upto) if status == ACTIVE)
        self._rebuild(set(acc).union(*active), acc, self._reader.active(upto))

    def _rebuild(self, names, acc, stream) -> None:
        ordered = [name for name in self.state.modules if name in names]
        self.state.rebuild(ordered, stream, acc)
        self.state.edits = self._reader.in_effect()
