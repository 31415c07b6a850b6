"""The reward's sequences split over the ranks of one model.

Every rank runs its own rows through all layers (ZeRO-3 gathers each layer once for all of them)
and sums its terms; the sums over ranks are the reward, and gradients are summed where they reach
the factors, which are far smaller than the hypernetwork behind them. From there on every rank
computes the same: signals, action, shifts, parameters.

Shapes: ``N`` sequences, ``M`` answer tokens of the unrelated ones, ``V`` the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from hiedit.backbone.losses import AnswerLogits, answer_kl, answer_nll
from hiedit.config import ObjectiveConfig
from hiedit.rl.environment import Environment
from hiedit.rl.objective import Objective, RewardBatch
from hiedit.sharded.ranks import Ranks
from hiedit.types import IGNORE, Shift, Shifts


class SplitObjective(Objective):
    """An ``Objective`` whose rows are measured by all ranks together; each gets all of it.

    References of prompts that are new are measured by every rank: they are few, and what a rank
    knows decides how many forward passes it makes, which must be as many as the others make.
    """

    def __init__(self, config: ObjectiveConfig, tokenizer, ranks: Ranks, seed: int = 0):
        super().__init__(config, tokenizer, seed)
        if config.at_once:
            raise ValueError(
                f"method.objective.at_once={config.at_once}: the ranks of a sharded model split "
                "the reward's sequences between them; leave it 0"
            )
        self.ranks = ranks

    def _terms(
        self, env: Environment, batch: RewardBatch, reference: Tensor | None, shifts: Shifts
    ) -> tuple[Tensor, Tensor]:
        rows = batch.edits if reference is None else len(batch.tokens)
        mine = own_rows(rows, self.ranks)
        filler = not mine  # every rank has to gather every layer
        at = torch.tensor(mine or [0], device=batch.weights.device)
        edits = int((at < batch.edits).sum())
        weights = batch.weights[at] * (not filler)
        answers = env.answers(batch.tokens.select(at), summed_gradients(shifts, self.ranks))
        edit = (answer_nll(answers.take(0, edits)) * weights[:edits]).sum()
        if reference is None:
            return self._total(edit), edit.new_zeros(())
        local = answers.take(edits, len(at))
        known = _place(batch)
        here = torch.isin(known.row, at[edits:] - batch.edits)
        locality = (answer_kl(local, reference[here]) * weights[edits:]).sum()
        whole = reference.new_zeros(len(here), local.logits.shape[-1])
        whole[here] = local.logits.detach().float() * (not filler)
        everyone = AnswerLogits(
            self.ranks.sum_(whole, "logits"), known.target, known.row, known.rows
        )
        self.references.measured(env, batch.local, everyone, shifts)
        return self._total(edit), self._total(locality)

    def _total(self, part: Tensor) -> Tensor:
        """The value of the sum over ranks with the gradient of this rank's part: whether it is
        finite, which decides whether there is a backward pass, must be the same everywhere."""
        total = self.ranks.sum_(part.detach().clone())
        return total + (part - part.detach())


def own_rows(count: int, ranks: Ranks) -> list[int]:
    """Those of ``count`` rows that this rank measures; every row is exactly one rank's."""
    return list(range(ranks.rank, count, ranks.world))


def _place(batch: RewardBatch) -> AnswerLogits:
    """Targets and rows of the answer tokens of the unrelated prompts; no logits."""
    labels = batch.tokens.labels[batch.edits :]
    row, column = (labels != IGNORE).nonzero(as_tuple=True)
    none = batch.weights.new_empty(0)
    return AnswerLogits(none, labels[row, column], row, len(labels))


def summed_gradients(shifts: Shifts, ranks: Ranks) -> Shifts:
    """``shifts`` whose gradients are, on every rank, the sum of what all ranks send back."""
    parts = [
        (name, key, t)
        for name, shift in shifts.items()
        for key, t in (("A", shift.A), ("B", shift.B), ("scale", shift.scale))
        if t is not None and t.requires_grad
    ]
    if not parts:
        return shifts
    tensors: Sequence[Tensor] = _Summed.apply(ranks, *(t for *_, t in parts))
    found = {(name, key): t for (name, key, _), t in zip(parts, tensors, strict=True)}

    def of(name: str, shift: Shift) -> Shift:
        keys = (("A", shift.A), ("B", shift.B), ("scale", shift.scale))
        return Shift(*(found.get((name, key), t) for key, t in keys))

    return {name: of(name, shift) for name, shift in shifts.items()}


class _Summed(Function):
    """The identity, whose gradients are summed over the ranks in one transfer."""

    @staticmethod
    def forward(ctx, ranks: Ranks, *tensors: Tensor):
        ctx.ranks = ranks
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        flat = torch.cat([g.reshape(-1).float() for g in grads])
        ctx.ranks.sum_(flat, "factors")
        parts = flat.split([g.numel() for g in grads])
        summed = (p.view(g.shape).to(g.dtype) for p, g in zip(parts, grads, strict=True))
        return None, *summed
