"""The negative reward after a transition, over the current and the last ``back_depth`` edits.

One padded batch holds every sequence that the reward looks at: one forward and backward pass
measures the model after the step (or several, ``at_once`` sequences each, where memory is scarce).
The model before it is measured on new prompts alone (no graph): an earlier edit keeps the prompts
that it brought, and what the last step made of them.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from hiedit.backbone.losses import AnswerLogits, answer_kl, answer_nll, joined
from hiedit.config import ObjectiveConfig
from hiedit.data.tokens import encode
from hiedit.rl.environment import Environment
from hiedit.rl.parts import in_parts
from hiedit.rl.reference import Pair, References
from hiedit.types import IGNORE, EditBatch, EditRequest, Reward, Shifts, TokenBatch


@dataclass(frozen=True)
class RewardBatch:
    """The sequences of one step's reward, the first ``edits`` rows of cross-entropy.

    tokens: [N, S]. weights: [N], ``gamma^age`` over the number of prompts that share it.
    local: the unrelated prompts with their answers, one for each of the other rows.
    """

    tokens: TokenBatch
    edits: int
    weights: Tensor
    local: tuple[Pair, ...]


@dataclass(frozen=True)
class Rows:
    """The rows that one edit brings to the reward: phrasings with the new answer, unrelated
    prompts."""

    edit: tuple[Pair, ...]
    local: tuple[Pair, ...]


class Objective:
    """Builds reward batches along a stream and computes the reward of candidate shifts."""

    def __init__(self, config: ObjectiveConfig, tokenizer, seed: int = 0):
        self.config, self.tokenizer = config, tokenizer
        depth = config.back_depth if config.kind == "trajectory" else 0
        self.past: deque[Rows] = deque(maxlen=depth)
        self.random = random.Random(seed)
        self.references = References(config.reference == "base")
        self._current: tuple[EditBatch, list[Rows]] | None = None

    def reset(self) -> None:
        """Begin a new stream."""
        self.past.clear()
        self._current = None

    def batch(self, step: EditBatch, device) -> RewardBatch:
        """The sequences of this step's reward: paraphrases and unrelated prompts of its edits,
        then one of each for every earlier edit in reach."""
        c = self.config
        current = [self._choose(request) for request in step.requests]
        self._current = step, current
        aged = [(rows, 1.0) for rows in current]
        aged += [(rows, c.gamma**age) for age, rows in enumerate(reversed(self.past), start=1)]
        edit = [(pair, w / len(rows.edit)) for rows, w in aged for pair in rows.edit]
        local = [(pair, w / len(rows.local)) for rows, w in aged for pair in rows.local]
        pairs = [pair for pair, _ in edit + local]
        tokens = encode(self.tokenizer, pairs, padding_side="left").to(device)
        weights = torch.tensor([w for _, w in edit + local], device=device)
        return RewardBatch(tokens, len(edit), weights, tuple(pair for pair, _ in local))

    def remember(self, step: EditBatch) -> None:
        """The step's edits are earlier edits from now on: each is seen through one paraphrase and
        one unrelated prompt, the same ones at every later step. They are drawn here, from those
        that the step itself looked at where it did, as those have been measured."""
        seen = self._current[1] if self._current and self._current[0] is step else None
        for request, rows in zip(step.requests, seen or [None] * len(step), strict=True):
            rows = rows or self._choose(request)
            seen_prompts = [pair for pair in rows.edit if pair[0] != request.prompt]
            others = seen_prompts or [(p, request.target) for p in request.paraphrases]
            local = rows.local or _known(request)
            self.past.append(
                Rows(
                    tuple(self.random.sample(others, min(1, len(others)))) or rows.edit[:1],
                    tuple(self.random.sample(local, min(1, len(local)))),
                )
            )

    def _choose(self, request: EditRequest) -> Rows:
        """Return what a current edit brings: itself (unless left out, or alone), paraphrases,
        places."""
        c, prompts, places = self.config, list(request.paraphrases), _known(request)
        chosen = self.random.sample(prompts, min(c.paraphrases, len(prompts)))
        near = self.random.sample(places, min(c.locality, len(places)))
        own = [request.prompt] if c.prompt or not chosen else []
        return Rows(tuple((p, request.target) for p in [*own, *chosen]), tuple(near))

    @torch.no_grad()
    def reference(self, env: Environment, batch: RewardBatch) -> Tensor | None:
        """[M_loc, V]: log-probabilities before the step on the unrelated prompts."""
        if not batch.local or self.config.c_loc == 0:
            return None
        rows = torch.arange(batch.edits, len(batch.tokens), device=batch.weights.device)
        return self.references(env, batch.local, batch.tokens.select(rows))

    def __call__(
        self,
        env: Environment,
        batch: RewardBatch,
        reference: Tensor | None,
        shifts: Shifts,
        energy: Tensor,
        size_in_gate: bool = True,
    ) -> Reward:
        """The reward's terms if ``shifts`` were committed.

        energy: [L], of the masked shifts. size_in_gate: whether the gradient of the plain norm
        may reach the mask (whoever computes the energy decides that for it).
        """
        c = self.config
        if c.at_once and c.at_once < len(batch.tokens):
            total, edit, locality = self._in_parts(env, batch, reference, shifts)
        else:
            edit, locality = self._terms(env, batch, reference, shifts)
            total = edit + c.c_loc * locality
        zero = total.new_zeros(())
        power = energy.sum() if c.rho else zero
        norm = squared_norm(shifts, size_in_gate) if c.c_reg and shifts else zero
        loss = total + c.rho * power + c.c_reg * norm
        return Reward(loss, edit.detach(), locality.detach(), (power + norm).detach())

    def _terms(
        self, env: Environment, batch: RewardBatch, reference: Tensor | None, shifts: Shifts
    ) -> tuple[Tensor, Tensor]:
        """(cross-entropy, KL), each the weighted sum over its rows of ``batch``."""
        edit, locality, local = self._measure(env, batch, reference, shifts, 0, len(batch.tokens))
        if local:
            self.references.measured(env, batch.local, *local, shifts)
        return edit, locality

    def _in_parts(
        self, env: Environment, batch: RewardBatch, reference: Tensor | None, shifts: Shifts
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(edit + c_loc locality, edit, locality), ``at_once`` rows at a time; only the first has
        a gradient."""
        local: list[AnswerLogits] = []  # of the unrelated prompts, part by part

        def measure(shifts: Shifts, first: int, last: int) -> tuple[Tensor, Tensor]:
            edit, locality, seen = self._measure(env, batch, reference, shifts, first, last)
            local.extend(seen)
            terms = torch.stack([edit.detach(), locality.detach()])
            return edit + self.config.c_loc * locality, terms

        rows, size = len(batch.tokens), self.config.at_once
        bounds = [(first, min(first + size, rows)) for first in range(0, rows, size)]
        total, terms = in_parts(measure, bounds, shifts)
        if local:
            self.references.measured(env, batch.local, joined(local), shifts)
        return total, *terms.unbind()

    def _measure(self, env, batch: RewardBatch, reference, shifts: Shifts, first: int, last: int):
        """(edit term, locality term, logits of the unrelated prompts if they count) of the rows
        ``first`` to ``last``."""
        whole = last - first == len(batch.tokens)
        rows = torch.arange(first, last, device=batch.weights.device)
        answers = env.answers(batch.tokens if whole else batch.tokens.select(rows), shifts)
        split = min(max(batch.edits - first, 0), last - first)  # how many rows are of edits
        weights = batch.weights[first:last]
        nll = answer_nll(answers.take(0, split))
        edit = (nll * weights[:split]).sum()
        if reference is None or split == last - first:
            return edit, edit.new_zeros(()), []
        local = answers.take(split, last - first)
        before = self._logp_before(batch, first + split, last, reference)
        locality = (answer_kl(local, before) * weights[split:]).sum()
        kept = AnswerLogits(local.logits.detach(), local.target, local.row, local.rows)
        return edit, locality, [kept]

    @staticmethod
    def _logp_before(batch: RewardBatch, first: int, last: int, reference: Tensor) -> Tensor:
        """The rows of ``reference`` that belong to the sequences ``first`` to ``last``."""
        if last - first == len(batch.local):
            return reference
        counts = (batch.tokens.labels[batch.edits : last] != IGNORE).sum(1)
        skip = int(counts[: first - batch.edits].sum())
        return reference[skip : int(counts.sum())]


def _known(request: EditRequest) -> list[Pair]:
    """The unrelated prompts whose answer is known."""
    return [(place.prompt, place.answer) for place in request.locality if place.answer]


def squared_norm(shifts: Shifts, through_mask: bool = True) -> Tensor:
    """``sum |delta_W|_F^2`` from the factors alone: ``tr((A A^T)(B^T B))``, no dense shift;
    through_mask: whether its gradient reaches the mask."""
    total = []
    for shift in shifts.values():
        scale = shift.scale if shift.scale is None or through_mask else shift.scale.detach()
        b = shift.B if scale is None else shift.B * scale
        total.append(((shift.A @ shift.A.T) * (b.T @ b)).sum())
    return torch.stack(total).sum()
