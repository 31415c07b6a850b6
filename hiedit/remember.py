"""The memory of a method that edits, kept in the ledger beside the edits.

Running statistics and protected keys are no part of the weights, but the next edit depends on
them. They are copied into the ledger when an editor closes and from time to time; after a crash,
the protected keys of later edits come from the edits themselves, and the statistics of those (a
few hundred tokens of many thousands) are what is lost. The texts before which edits are made
too are drawn once in a ledger's life, and stored with its first edit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from hiedit.config import MethodConfig, UpdaterConfig
from hiedit.ledger.ledger import Ledger
from hiedit.ledger.records import ACTIVE, Record
from hiedit.methods import Method
from hiedit.provenance import digest
from hiedit.rl.sequences import as_tensor, from_tensor
from hiedit.updaters.memory import absorb_kept, lifelong_state, load_lifelong_state

SAVE_EVERY = 256  # edits between two copies
CONTEXTS = "contexts"  # attachment, and its only tensor
# Settings that came after the first ledgers: at their defaults a method's memory is as before.
LATER = {
    UpdaterConfig: (
        "contexts",
        "own_text",
        "subject_alone",
        "preserve_subjects",
        "damping",
        "freedom",
        "average_gradients",
        "average_keys",
        "average_passes",
        "trust_region",
        "own_weight",
    )
}


def memory_tag(config: MethodConfig) -> str:
    """Return what tells the memory of one method from that of another: a digest of all its
    settings."""
    return digest(_settings(config))


def _settings(config: Any) -> str:
    """``repr``, without what ``LATER`` leaves out."""
    if not dataclasses.is_dataclass(config):
        return repr(config)
    told = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in LATER.get(type(config), ()) or value != field.default:
            told.append(f"{field.name}={_settings(value)}")
    return f"{type(config).__name__}({', '.join(told)})"


class Memory:
    """Binds one method's memory to one ledger; a change of method begins a memory of its own."""

    def __init__(self, method: Method, ledger: Ledger):
        self.ledger, self._updater = ledger, method.rollout.updater
        self._parts: dict[str, nn.Module] = {
            "updater": method.rollout.updater,
            "selector": method.rollout.selector,
        }
        self._rollout = method.rollout
        self._tag = memory_tag(method.config)
        history = ledger.history()
        self._newest = history[-1].id if history else 0
        self._unsaved = self._recall(history)
        self._kept = self._recall_contexts()

    def committed(self, edit: int) -> None:
        """Tell it of a commit."""
        self._newest = edit
        self._keep_contexts()
        self._unsaved += 1
        if self._unsaved >= SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Copy what changed since the last time into the ledger.

        Raises:
            LedgerError: if it could not be stored.
        """
        self._keep_contexts()
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

    def _recall_contexts(self) -> bool:
        """Tell whether there is nothing to keep: the rollout has the ledger's contexts, or none."""
        rollout = self._rollout
        saved = self.ledger.load_attachment(CONTEXTS, self._tag) if rollout.contexts else None
        if saved is not None:
            rollout.contexts = from_tensor(saved.tensors[CONTEXTS])
        return saved is not None or not rollout.contexts

    def _keep_contexts(self) -> None:
        if not self._kept:
            texts = {CONTEXTS: as_tensor(self._rollout.contexts)}
            self.ledger.save_attachment(CONTEXTS, self._newest, texts, self._tag)
            self._kept = True
