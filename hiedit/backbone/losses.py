"""Losses and decisions at the answer's positions only; the rest of the vocabulary's logits are
never computed.

Shapes: ``M`` answer tokens in a batch of ``N`` sequences, ``V`` the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AnswerLogits:
    """logits: [M, V]. target: int64 [M], the answer's tokens. row: int64 [M], their sequence,
    ascending. rows: N."""

    logits: Tensor
    target: Tensor
    row: Tensor
    rows: int

    def take(self, start: int, stop: int) -> AnswerLogits:
        """The sequences ``start`` to ``stop``, renumbered from 0."""
        keep = (self.row >= start) & (self.row < stop)
        return AnswerLogits(
            self.logits[keep], self.target[keep], self.row[keep] - start, stop - start
        )


def joined(parts: Sequence[AnswerLogits]) -> AnswerLogits:
    """The sequences of all ``parts``, one part after the other."""
    starts = [sum(p.rows for p in parts[:i]) for i in range(len(parts))]
    row = torch.cat([p.row + start for p, start in zip(parts, starts, strict=True)])
    logits, target = (torch.cat([getattr(p, n) for p in parts]) for n in ("logits", "target"))
    return AnswerLogits(logits, target, row, sum(p.rows for p in parts))


def mean_by_row(values: Tensor, answers: AnswerLogits) -> Tensor:
    """values: [M] -> [N], the mean over each sequence's answer tokens."""
    total = values.new_zeros(answers.rows).index_add(0, answers.row, values)
    count = torch.bincount(answers.row, minlength=answers.rows).clamp(min=1)
    return total / count


def answer_nll(answers: AnswerLogits) -> Tensor:
    """[N], mean negative log-likelihood of each sequence's answer tokens, in nats."""
    return mean_by_row(
        F.cross_entropy(answers.logits.float(), answers.target, reduction="none"), answers
    )


def answer_confidence(answers: AnswerLogits) -> Tensor:
    """[N], the smallest probability of any of a sequence's answer tokens."""
    logp = answers.logits.detach().float().log_softmax(-1)
    chosen = logp.gather(-1, answers.target[:, None]).squeeze(-1).exp()
    return chosen.new_ones(answers.rows).scatter_reduce(0, answers.row, chosen, "amin")


def answer_hits(answers: AnswerLogits) -> Tensor:
    """bool [M]: the token is the most likely one given the answer so far."""
    return answers.logits.argmax(-1) == answers.target


def answer_kl(answers: AnswerLogits, reference_logp: Tensor) -> Tensor:
    """[N], mean over answer positions of ``KL(reference || model)`` in nats.

    reference_logp: [M, V], log-probabilities of the model that serves as the reference.
    """
    logp = answers.logits.float().log_softmax(-1)
    kl = (reference_logp.exp() * (reference_logp - logp)).sum(-1)
    return mean_by_row(kl, answers)
