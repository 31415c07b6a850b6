"""Signals: what an edit looks like at every editable module."""

from __future__ import annotations

import torch
from torch import Tensor

from hiedit.backbone.losses import answer_confidence, answer_nll
from hiedit.backbone.model import Backbone, at_tokens
from hiedit.backbone.past import Past
from hiedit.types import IGNORE, Signals, TokenBatch

TOKENS = ("answer", "all", "subject")


def edit_tokens(batch: TokenBatch, which: str = "all") -> Tensor:
    """bool [N, S]: the positions whose keys and gradients describe the edit.

    ``answer``: those that predict an answer token. ``all``: every position up to the last of
    them (later ones have no gradient). ``subject``: the last token of the subject, in sequences
    where none is known those of ``answer``. Padding is never among them.

    Raises:
        ValueError: for another ``which``.
    """
    predicts = torch.zeros_like(batch.labels, dtype=torch.bool)
    predicts[:, :-1] = batch.labels[:, 1:] != IGNORE
    if which == "answer":
        return predicts
    if which == "subject":
        return _at_subject(batch, predicts)
    if which != "all":
        raise ValueError(f"tokens={which!r}: valid are {', '.join(TOKENS)}")
    upto = predicts.flip(1).cumsum(1).flip(1) > 0
    return upto & batch.attention.bool()


def _at_subject(batch: TokenBatch, otherwise: Tensor) -> Tensor:
    """bool [N, S]: the column ``batch.subject``; the row of ``otherwise`` where that is not set."""
    if batch.subject is None:
        return otherwise
    columns = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    known = (batch.subject >= 0)[:, None]
    return torch.where(known, columns == batch.subject[:, None], otherwise)


class Probe:
    """One forward pass over an edit, and its signals on demand.

    The forward pass says at once whether the edit already holds (``loss``, ``confidence``);
    the backward pass is only paid for when ``signals`` is called.

    batch: the edit sequences, [N, S]; ``batch.edit`` says which of ``E`` edits each belongs to.
    tokens: see ``edit_tokens``. past: of the batch, what stands before these tokens.
    """

    def __init__(
        self,
        backbone: Backbone,
        batch: TokenBatch,
        edits: int,
        tokens: str = "all",
        past: Past | None = None,
    ):
        with torch.enable_grad(), backbone.capture() as (inputs, outputs):
            answers = backbone.answers(batch, past)
        batch = batch if past is None else past.rest
        with torch.enable_grad():
            nll = answer_nll(answers)
            answer = (batch.labels != IGNORE).sum(1)
            self._asked = answer > 0
            rows = torch.bincount(batch.edit[self._asked], minlength=edits).clamp(min=1)
            self._answer = nll.new_zeros(edits).index_add(0, batch.edit, answer.to(nll)) / rows
            per_edit = nll.new_zeros(edits).index_add(0, batch.edit, nll) / rows
            self._total = per_edit.sum()
        self._inputs, self._batch, self._tokens = inputs, batch, tokens
        self._outputs = {n: outputs[n] for n in backbone.names if n in outputs}  # not as called
        self.loss = per_edit.detach()
        lowest = answer_confidence(answers)
        self.confidence = lowest.new_ones(edits).scatter_reduce(0, batch.edit, lowest, "amin")

    def signals(self) -> Signals:
        """Keys and value gradients at the edit tokens; call once, the graph is freed.

        Each edit's loss is summed, so an edit's gradients do not depend on the batch around it.
        """
        names, attention = list(self._outputs), self._batch.attention
        grads = torch.autograd.grad(self._total, list(self._outputs.values()))
        where = edit_tokens(self._batch, self._tokens)
        edit = self._batch.edit[:, None].expand_as(where)[where]
        found = {
            n: at_tokens(g, where, attention).float() for n, g in zip(names, grads, strict=True)
        }
        asked = self._asked[:, None].expand_as(where)[where]
        if not bool(asked.all()):
            found = {n: _shared(g, edit, asked, len(self.loss)) for n, g in found.items()}
        return Signals(
            keys={n: at_tokens(self._inputs[n], where, attention).float() for n in names},
            grads=found,
            edit=edit,
            loss=self.loss,
            confidence=self.confidence,
            subject=self._named(where),
            answer=self._answer,
        )

    def _named(self, where: Tensor) -> Tensor | None:
        """bool [T]: which of the edit tokens ``where`` [N, S] are the last of a subject."""
        if self._tokens != "subject" or self._batch.subject is None:
            return None
        return (self._batch.subject >= 0)[:, None].expand_as(where)[where]


def _shared(grads: Tensor, edit: Tensor, asked: Tensor, edits: int) -> Tensor:
    """[T, O]: where a sequence asks nothing (``asked`` [T] is False), the mean gradient of those
    of its edit that do: the same change of the outputs is wanted there."""
    mean = grads.new_zeros(edits, grads.shape[1]).index_add(0, edit[asked], grads[asked])
    count = torch.bincount(edit[asked], minlength=edits).clamp(min=1)
    return torch.where(asked[:, None], grads, (mean / count[:, None])[edit])
