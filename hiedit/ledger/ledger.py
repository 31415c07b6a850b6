"""The ledger: the durable record of all committed edits, and the model that follows from it.

    commit:          factors -> disk -> acknowledged -> weights
    revert, restore: status  -> disk -> acknowledged -> the touched modules rebuilt
    open:            newest snapshot -> edits after it -> weights

The weights are a pure function of the base weights and the ordered set of edits in effect, bit for
bit, whichever path led there (docs/ledger.md).
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hiedit.ledger import snapshots
from hiedit.ledger.compact import Compaction, compact
from hiedit.ledger.errors import LedgerError, NotFiniteError, listed
from hiedit.ledger.fingerprint import ModuleInfo
from hiedit.ledger.reader import Attachment, Reader
from hiedit.ledger.records import ACTIVE, DROPPED, REVERTED, Entry, Event, Record
from hiedit.ledger.state import DeltaState
from hiedit.ledger.store import Store
from hiedit.ledger.verify import Verification, verify
from hiedit.types import Shift

HELD_BYTES = 512 << 20  # factors read for a revert are kept in memory up to here, then read twice


class Ledger:
    """The edits of one model, on disk and in its weights.

    Opening replays the edits in effect onto the model, which must be the base model, unedited.
    Every change is on disk when the call returns. Methods may be called from several threads, one
    at a time; after a fork, only the parent may go on.

    Args:
        directory: of the ledger; made if it is not there.
        state: of the base model, nothing committed to it yet.
        described: what is known of its modules, where their weights are not whole in this process.

    Raises:
        LedgerLocked: if another process writes to it, naming it.
        LedgerError: if its format is a later one, or it cannot be written.
        DamagedError: if a file that is needed is damaged, naming it and the edits in it; the model
            is left unedited.
        ValueError: for another base model, naming the module that differs.
    """

    def __init__(
        self,
        directory: str | Path,
        state: DeltaState,
        described: Mapping[str, ModuleInfo] | None = None,
    ):
        if state.edits:
            raise ValueError(
                f"the model has {state.edits} edits already: open a ledger on the base model"
            )
        self.directory = Path(directory).expanduser().absolute()
        self.state = state
        self._turn = threading.RLock()
        self._unusable = ""
        self._store = Store(self.directory, described or state.modules)
        try:
            try:
                self._replay()
            except NotFiniteError:
                self._finish()
                self._replay()
            self._tail = snapshots.tail(self._store)
        except BaseException:
            state.reset()
            self._store.close()
            raise

    @staticmethod
    def read(directory: str | Path) -> Reader:
        """Only reads: history, factors, verification; at any time, also beside a writer."""
        return Reader(Path(directory).expanduser().absolute(), None)

    def commit(self, entries: Iterable[Entry]) -> list[int]:
        """Stores the edits as one group, all or none, then applies them to the weights in order.

        Returns:
            Their ids, in the order given.

        Raises:
            ValueError: for an unknown module, shapes that do not fit, a factor that is not finite
                or would make a weight infinite, or a report that is not JSON; nothing was changed.
            LedgerError: if they could not be stored (a full disk, say); nothing was changed.
        """
        entries = list(entries)
        with self._operation():
            baked = self._store.bake(entries)
            if not entries:
                return []
            ids = self._store_edits(entries, baked)
            names = {name for shifts in baked for name in shifts}
            with self._applying(ids, lambda: self._take_back(ids, names)):
                for shifts in baked:
                    self.state.commit(shifts)
            work = sum(
                shift.rank * self._store.modules[name].elements
                for shifts in baked
                for name, shift in shifts.items()
            )
            self._tail = self._tail[0] + len(ids), self._tail[1] + work
            self._snapshot_if_due()
            return ids

    def revert(self, ids: Iterable[int]) -> list[int]:
        """Takes edits out: any subset, in any order. The weights are then those without them.

        Returns:
            The ids, sorted.

        Raises:
            ValueError: for an id that is unknown, reverted already or folded; nothing was changed.
            DamagedError: if factors that the rebuild needs are damaged; nothing was changed.
            LedgerError: if it could not be stored; nothing was changed.
        """
        return self._set("revert", ids, ACTIVE, REVERTED)

    def restore(self, ids: Iterable[int]) -> list[int]:
        """Puts reverted edits back at their places in the order. Returns, raises as ``revert``."""
        return self._set("restore", ids, REVERTED, ACTIVE)

    def snapshot(self) -> None:
        """Stores the accumulators now; done from time to time without being asked.

        Raises:
            LedgerError: if they could not be stored.
        """
        with self._operation():
            snapshots.save(self._store, self._store.newest(), self.state.acc)
            self._tail = 0, 0

    def compact(self, keep: int | None = None) -> Compaction:
        """Packs small files together and removes what is not needed; no weight changes.

        Args:
            keep: also fold all but the newest ``keep`` edits into a base snapshot. They stay in
                effect and in the history, but their factors go: they can no longer be reverted, and
                those that are reverted can no longer be restored.

        Raises:
            ValueError: if ``keep`` is no number of edits.
            LedgerError: if it could not be completed; what was done so far is consistent.
        """
        with self._operation():
            report = compact(self._store, keep)
            self._tail = snapshots.tail(self._store)
            return report

    def verify(self) -> Verification:
        """Reads everything again, and compares the accumulators in memory with a replay."""
        with self._operation():
            return verify(self._store, self.state.acc)

    def history(self) -> list[Record]:
        """Every edit that was ever committed, in canonical order."""
        with self._operation():
            return self._store.history()

    def record(self, edit: int) -> Record:
        """One edit of the history; raises ValueError for an id that was never given."""
        with self._operation():
            return self._store.record(edit)

    def events(self) -> list[Event]:
        """Return what was done to the ledger, in order."""
        with self._operation():
            return self._store.events()

    def find(self, prompt: str) -> list[Record]:
        """The edits in effect (active or folded) with exactly this prompt, in canonical order."""
        with self._operation():
            return self._store.find(prompt)

    def shifts(self, edit: int) -> dict[str, Shift]:
        """Do as ``Reader.shifts``."""
        with self._operation():
            return self._store.shifts(edit)

    def memory(self, edit: int) -> dict[str, Tensor]:
        """Do as ``Reader.memory``."""
        with self._operation():
            return self._store.memory(edit)

    def save_attachment(self, name: str, upto: int, tensors: Mapping[str, Tensor], tag: str):
        """Do as ``Store.save_attachment``."""
        with self._operation():
            self._store.save_attachment(name, upto, tensors, tag)

    def load_attachment(self, name: str, tag: str) -> Attachment | None:
        """Do as ``Reader.load_attachment``."""
        with self._operation():
            return self._store.load_attachment(name, tag)

    def close(self) -> None:
        """Lets another process write; the model keeps its weights. Twice does no harm."""
        with self._turn:
            if self._unusable != "it is closed":
                if not self._unusable:
                    self._snapshot_if_due(closing=True)
                self._unusable = "it is closed"
                self._store.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _store_edits(self, entries: list[Entry], shifts: list[dict[str, Shift]]) -> list[int]:
        return self._store.append(entries, shifts)

    def _set(self, what: str, ids: Iterable[int], old: str, new: str) -> list[int]:
        with self._operation():
            store = self._store
            ids = store.check(what, ids, old)
            if not ids:
                return ids
            names = {name for edit in ids for name in store.record(edit).layers}
            upto, acc = snapshots.start(store, below=ids[0], names=names)
            after = [
                edit for edit, status, layers in store.layers(upto)
                if layers & names and (new if edit in ids else status) == ACTIVE
            ]  # fmt: skip
            stream = self._checked(after)
            store.set_status(what, ids, old, new)
            with self._applying(ids, lambda: store.set_status("undo", ids, new, old)):
                self._rebuild(names, acc, stream)
            self._tail = snapshots.tail(store)
            self._snapshot_if_due()
            return ids

    def _checked(self, edits: list[int]) -> Iterable[dict[str, Shift]]:
        """The factors of ``edits``, read and compared with their checksums before this returns:
        what is damaged has to be found before anything changes."""
        held, size = [], 0
        for edit in edits:
            shifts = self._store.shifts(edit)
            size += sum(4 * (s.A.numel() + s.B.numel()) for s in shifts.values())
            if size <= HELD_BYTES:
                held.append(shifts)
        return itertools.chain(held, map(self._store.shifts, edits[len(held) :]))

    def _rebuild(self, names: Collection[str], acc: Mapping[str, Tensor], stream) -> None:
        ordered = [name for name in self.state.modules if name in names]
        self.state.rebuild(ordered, stream, acc)
        self.state.edits = self._store.in_effect()

    def _replay(self) -> None:
        """Bring the base model to the edits in effect."""
        store = self._store
        upto, acc = snapshots.start(store)
        active = (layers for _, status, layers in store.layers(upto) if status == ACTIVE)
        self._rebuild(set(acc).union(*active), acc, store.active(upto))

    def _take_back(self, ids: list[int], names: Collection[str]) -> None:
        """Put a group that the weights refused out of effect."""
        self._store.set_status("drop", ids, ACTIVE, DROPPED)
        upto, acc = snapshots.start(self._store, below=ids[0], names=names)
        self._rebuild(names, acc, self._store.active(upto))

    def _finish(self) -> None:
        """Undoes the last change where the weights refuse the edits in effect at opening.

        Only a process that died between storing a change and undoing it, as ``_applying`` does,
        leaves such edits; the change was never acknowledged.
        """
        last = self._store.events()[-1]
        ids = list(last.ids)
        turns = {
            "commit": (ACTIVE, DROPPED), "revert": (REVERTED, ACTIVE), "restore": (ACTIVE, REVERTED)
        }  # fmt: skip
        if last.what not in turns:
            raise LedgerError(f"the edits of {self.directory} do not add up to finite weights")
        self._store.set_status("undo", ids, *turns[last.what])
        warnings.warn(
            f"the {last.what} of edits {listed(ids)} was undone: it would have made a weight "
            "infinite, and the process that made it died before it could take it back",
            RuntimeWarning,
            stacklevel=4,
        )

    def _snapshot_if_due(self, closing: bool = False) -> None:
        """The edits are safe without it: a failure is a warning, not an error of the commit."""
        elements = sum(acc.numel() for acc in self.state.acc.values())
        if snapshots.due(*self._tail, elements, closing):
            try:
                self.snapshot()
            except LedgerError as error:
                self._tail = 0, self._tail[1]  # not again at the very next edit
                warnings.warn(str(error), RuntimeWarning, stacklevel=4)

    @contextlib.contextmanager
    def _operation(self) -> Iterator[None]:
        with self._turn:
            if self._unusable:
                raise LedgerError(
                    f"the ledger in {self.directory} cannot be used: {self._unusable}; open it "
                    "again on the base model"
                )
            self._store.lock.check()
            yield

    @contextlib.contextmanager
    def _applying(self, ids: list[int], undo: Callable[[], None]) -> Iterator[None]:
        """Guard the way between disk and weights: whoever is interrupted here must not go on with
        the model.

        The weights may refuse a change, where it would make one of them infinite; then it is undone
        on disk as well.
        """
        self._unusable = f"edits {listed(ids)} are stored, but were not applied to the weights"
        try:
            yield
        except ValueError:
            undo()
            self._unusable = ""
            raise
        self._unusable = ""
