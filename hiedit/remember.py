"""What a method learns while it edits, kept in the ledger beside the edits.

Running statistics and protected keys are no part of the weights, but the next edit depends on
them. They are copied into the ledger when an editor closes and from time to time; after a crash,
the protected keys of later edits come from the edits themselves, and the statistics of those (a
few hundred tokens of many thousands) are what is lost.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hiedit.ledger.ledger import Ledger
from hiedit.ledger.records import ACTIVE, Record
from hiedit.methods import Method
from hiedit.provenance import digest
from hiedit.updaters.memory import absorb_kept, lifelong_state, load_lifelong_state

SAVE_EVERY = 256  # edits between two copies


class Memory:
    """Binds one method's memory to one ledger; a change of method begins a memory of its own."""

    def __init__(self, method: Method, ledger: Ledger):
        self.ledger, self._updater = ledger, method.rollout.updater
        self._parts: dict[str, nn.Module] = {
            "updater": method.rollout.updater,
            "selector": method.rollout.selector,
        }
        self._tag = digest(repr(method.config))
        history = ledger.history()
        self._newest = history[-1].id if history else 0
        self._unsaved = self._recall(history)

    def committed(self, edit: int) -> None:
        """Tell it of a commit."""
        self._newest = edit
        self._unsaved += 1
        if self._unsaved >= SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Copy what changed since the last time into the ledger.

        Raises:
            LedgerError: if it could not be stored.
        """
        if not self._unsaved:
            return
        state = {
            f"{part}/{name}": value.cpu()
            for part, module in self._parts.items()
            for name, value in lifelong_state(module).items()
        }
        self.ledger.save_attachment("method", self._newest, state, self._tag)
        self._unsaved = 0

    def _recall(self, history: Sequence[Record]) -> int:
        """Bring the method to where the last editor stopped; returns how many edits had to be
        absorbed anew, because that one did not close."""
        saved = self.ledger.load_attachment("method", self._tag)
        for part, module in self._parts.items() if saved else ():
            prefix = f"{part}/"
            load_lifelong_state(
                module,
                {
                    n.removeprefix(prefix): t
                    for n, t in saved.tensors.items()
                    if n.startswith(prefix)
                },
            )
        upto = saved.upto if saved else 0
        late = [r.id for r in history if r.id > upto and r.status == ACTIVE]
        for edit in late:
            absorb_kept(self._updater, self.ledger.memory(edit))
        return len(late)
