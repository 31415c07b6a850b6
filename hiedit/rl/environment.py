"""The environment: a model, the shifts committed to it, and those that the current edit tries.

State at step t: the committed weights and the request, observed as signals. An edit is an option
of several passes; its passes stay functional (part of the forward pass, no weight touched) until
``commit``, so undoing one is dropping it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from hiedit.backbone.losses import AnswerLogits
from hiedit.backbone.model import Backbone, joined
from hiedit.backbone.past import Past
from hiedit.backbone.signals import Probe, edit_tokens
from hiedit.ledger.state import DeltaState
from hiedit.types import Shift, Shifts, TokenBatch


class Environment:
    """One edited model. ``state`` holds the committed edits, ``pending`` the passes on trial.

    ``version`` counts the changes of the weights; ``committed`` are the passes of the last one
    (none if it was a reset), for whoever measured them on trial.
    """

    def __init__(self, backbone: Backbone):
        self.backbone = backbone
        self.state = DeltaState(backbone.modules)
        self.pending: list[Shifts] = []
        self.committed: list[Shifts] = []
        self.version = 0

    def reset(self) -> None:
        """Back to the base model, bit for bit."""
        self.pending, self.committed = [], []
        self.version += 1
        self.state.reset()

    def probe(self, batch: TokenBatch, edits: int, tokens: str, past: Past | None = None) -> Probe:
        """A forward pass over the edit with the pending passes in place; signals on demand."""
        with self.with_shifts():
            return Probe(self.backbone, batch, edits, tokens, past)

    def past(self, batch: TokenBatch, tokens: str) -> Past | None:
        """Return what stands before the positions that an edit acts on, with the committed weights;
        None where that would be nothing, or cannot be kept apart."""
        if tokens != "subject":
            return None
        where = edit_tokens(batch, tokens)
        return self.backbone.past(batch, where.long().argmax(-1))

    @contextlib.contextmanager
    def with_shifts(self, candidate: Shifts | None = None) -> Iterator[None]:
        """The model with the pending passes and, on top of them, ``candidate``."""
        stacks: dict[str, list[Shift]] = {}
        for shifts in [*self.pending, candidate or {}]:
            for name, shift in shifts.items():
                stacks.setdefault(name, []).append(shift)
        with self.backbone.shifted(stacks):
            yield

    def answers(self, batch: TokenBatch, candidate: Shifts | None = None) -> AnswerLogits:
        """Logits of the answer's tokens under the pending passes and ``candidate``."""
        with self.with_shifts(candidate):
            return self.backbone.answers(batch)

    def push(self, shifts: Shifts) -> None:
        """Try a pass; nothing of it keeps a graph, modules that no edit touches are left out."""
        used = {n: s for n, s in shifts.items() if s.scale is None or bool(s.scale.any())}
        self.pending.append({name: shift.detach() for name, shift in used.items()})

    def pop(self) -> Shifts:
        """Take the last pass back."""
        return self.pending.pop()

    def scale(self, factor: float) -> None:
        """Make all pending passes ``factor`` times as large."""
        self.pending = [{n: scaled(s, factor) for n, s in p.items()} for p in self.pending]

    def trial(self) -> Shifts:
        """The pending passes as one shift per module."""
        return merge(self.pending)

    def drop(self) -> None:
        """Take all pending passes back."""
        self.pending = []

    def commit(
        self,
        write: Callable[[Shifts], object] | None = None,
        merged: Shifts | None = None,
    ) -> Shifts:
        """Make the pending passes part of the weights; returns them as one shift per module.

        write: puts the shifts into the weights; by default ``state.commit``. If it raises, the
        passes stay pending. merged: what ``trial`` gave, if nothing was tried since.
        """
        merged = self.trial() if merged is None else merged
        (write or self.state.commit)(merged)
        passes, self.pending = self.pending, []
        if merged:
            self.committed = passes
            self.version += 1
        return merged

    def rewritten(self) -> None:
        """Someone else changed the weights: nothing that was measured holds any longer."""
        self.pending, self.committed = [], []
        self.version += 1


def scaled(shift: Shift, factor: float) -> Shift:
    """``shift`` times ``factor``."""
    scale = shift.A.new_ones(shift.rank) if shift.scale is None else shift.scale
    return Shift(shift.A, shift.B, scale * factor)


def merge(passes: list[Shifts]) -> Shifts:
    """One shift per module whose rank rows are those of all passes in order; rows of modules that
    a mask left out (scale 0) are dropped."""
    merged: dict[str, Shift] = {}
    names = dict.fromkeys(name for shifts in passes for name in shifts)
    for name in names:
        shift = joined([shifts[name] for shifts in passes if name in shifts])
        keep = shift.scale != 0
        if not bool(keep.all()):
            shift = Shift(shift.A[keep], shift.B[:, keep], shift.scale[keep])
        if shift.rank:
            merged[name] = shift
    return merged
