"""A ledger without an editor: change statuses without a model, look at a model without writing.

change, compacted: need no model; what they change is in the weights when it is next opened
replay:            ledger -> weights of a base model; takes no lock, so also beside a writer
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hiedit.ledger import snapshots
from hiedit.ledger.compact import Compaction, compact
from hiedit.ledger.errors import DamagedError
from hiedit.ledger.fingerprint import describe
from hiedit.ledger.reader import Reader
from hiedit.ledger.records import ACTIVE, FOLDED, REVERTED, Record
from hiedit.ledger.state import DeltaState
from hiedit.ledger.store import Store
from hiedit.types import Shifts

TURNS = {"revert": (ACTIVE, REVERTED), "restore": (REVERTED, ACTIVE)}
Rows = dict[str, tuple[Tensor, Tensor]]


def change(directory: str | Path, what: str, ids: Iterable[int]) -> list[int]:
    """``revert`` or ``restore`` edits of a ledger that no process has open; any subset.

    As ``Ledger.revert`` and ``Ledger.restore``, but for one thing that takes the weights: whether
    their sum stays finite. Where it does not, the next ``Ledger`` that is opened undoes the change
    with a warning, if it was the last one.

    Returns:
        The ids, sorted.

    Raises:
        ValueError: for an id that is unknown or has another status, or where there is no ledger.
        DamagedError: if factors that are needed to compute the weights are damaged.
        LedgerError: if another process writes, or it could not be stored. Nothing was changed.
    """
    old, new = TURNS[what]
    with Store(_path(directory), None) as store:
        ids = store.check(what, ids, old)
        if ids:
            _check_factors(store, set(ids), new)
            store.set_status(what, ids, old, new)
        return ids


def compacted(directory: str | Path, keep: int | None = None) -> Compaction:
    """Do as ``Ledger.compact``, without a model; raises as that and ``change``."""
    with Store(_path(directory), None) as store:
        return compact(store, keep)


def check_free(directory: str | Path) -> None:
    """Raises what opening the ledger for writing would raise before it looks at the model: it is
    damaged, of a later format, or another process writes. Nothing where there is none yet."""
    path = _path(directory)
    if (path / "ledger.db").is_file():
        Store(path, None).close()


def replay(reader: Reader, state: DeltaState) -> list[Record]:
    """Brings the base model of ``state`` to the edits in effect; returns the history it shows.

    One moment of the ledger, also while another process goes on writing.

    Raises:
        ValueError: for another base model, naming the module that differs.
        DamagedError: if a file that is needed is damaged; the model is left unedited.
    """
    if state.edits or state.acc:
        raise ValueError("replay: the model has edits already; give the base model")
    describe(state.modules, list(reader.modules.values()))
    try:
        return _replay(reader, state)
    except DamagedError:  # a compaction may have moved files since the moment that is shown
        return _replay(reader, state)


def active_rows(records: Sequence[Record], shifts: Callable[[int], Shifts]) -> Rows | None:
    """All active edits' factors by module, ``(A [R, I], B [O, R])``, in order; None where some
    were folded into a snapshot. shifts: of one edit, ``Reader.shifts`` or ``Ledger.shifts``."""
    if any(record.status == FOLDED for record in records):
        return None
    parts: dict[str, list] = {}
    for record in records:
        if record.status == ACTIVE:
            for name, shift in shifts(record.id).items():
                parts.setdefault(name, []).append(shift)
    return {
        name: (torch.cat([s.A for s in found]), torch.cat([s.B for s in found], dim=1))
        for name, found in parts.items()
    }


def _path(directory: str | Path) -> Path:
    return Path(directory).expanduser().absolute()


def _check_factors(store: Store, ids: set[int], new: str) -> None:
    """Return what the changed modules will be replayed from must be readable: found out before."""
    names = {name for edit in ids for name in store.record(edit).layers}
    upto = max((s.upto for s in snapshots.valid(store) if s.upto < min(ids)), default=0)
    for edit, status, layers in store.layers(upto):
        if layers & names and (new if edit in ids else status) == ACTIVE:
            store.part(edit)


def _replay(reader: Reader, state: DeltaState) -> list[Record]:
    with _moment(reader):
        upto, acc = snapshots.start(reader)
        active = (layers for _, status, layers in reader.layers(upto) if status == ACTIVE)
        state.rebuild(list(set(acc).union(*active)), reader.active(upto), acc)
        state.edits = reader.in_effect()
        return reader.history()


@contextlib.contextmanager
def _moment(reader: Reader) -> Iterator[None]:
    """Have every query of the block see the same ledger."""
    reader.db.execute("BEGIN")
    try:
        yield
    finally:
        reader.db.execute("ROLLBACK")
