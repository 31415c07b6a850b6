"""Measuring what an edit would do before it is committed, and holding it to limits.

    Rollout.propose -> settle (watched tokens; halved where a bound is broken) -> predict
                    -> Guard.objections -> commit or drop

On by default: an edit that moves what it should not touch is made smaller, and rejected where it
then no longer holds; docs/safety.md has the figures that the bounds were chosen by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hiedit.backbone.losses import answer_hits, answer_kl, mean_by_row
from hiedit.data.tokens import encode
from hiedit.evaluation.metrics import SILENCE, answered
from hiedit.limits import Guard, Moved, Prediction
from hiedit.rl.environment import Environment
from hiedit.rl.rollout import Outcome, Rollout
from hiedit.types import EditBatch, EditRequest
from hiedit.watch import Watch

__all__ = ["Guard", "GuardedRollout", "Moved", "Prediction", "Verdict", "own_prompts", "predict",
           "settle", "unusable"]  # fmt: skip

Pair = tuple[str, str]  # prompt and answer

SCALES = {0.5: "half", 0.25: "a quarter", 0.125: "an eighth"}  # what is tried instead


@dataclass(frozen=True)
class Verdict:
    """The findings of ``settle``. outcome: of the edit at the size ``scale`` that keeps the bounds,
    else at its own. moved: what it does to the watched tokens, None where nothing was watched.
    reasons: the bounds that it breaks, empty if it may be committed."""

    outcome: Outcome
    moved: Moved | None = None
    scale: float = 1.0
    reasons: tuple[str, ...] = ()


def settle(env: Environment, watch: Watch, guard: Guard, outcome: Outcome) -> Verdict:
    """Holds the pending edit against the bounds, and makes it smaller where it breaks one: the
    largest of ``SCALES`` that keeps them, if the edit's prompts are then answered as before.

    The pending passes are those of the verdict's outcome afterwards.
    """
    if not guard.watches or not outcome.shifts:
        return Verdict(outcome)
    moved = watch.measure()
    reasons = guard.broken(moved)
    if not reasons:
        return Verdict(outcome, moved)
    whole, holds = env.pending, _holding(env, outcome.requests)
    last = moved
    for scale, size in SCALES.items():
        env.scale(0.5)
        last = watch.measure()
        if guard.broken(last):
            continue
        if 0 < holds <= _holding(env, outcome.requests):
            shrunk = dataclasses.replace(outcome, shifts=env.trial())
            return Verdict(shrunk, last, scale)
        note = f"at {size} of the shift it is within bounds, but then the edit does not hold"
        break
    else:
        note = f"at an eighth of the shift KL {last.kl:.4f}, drift {last.drift:.4f}"
    env.pending = whole
    return Verdict(outcome, moved, reasons=(*reasons[:-1], f"{reasons[-1]} ({note})"))


def unusable(outcome: Outcome) -> list[str]:
    """Return why an outcome is no edit at all, whatever the limits."""
    finite = all(
        bool(s.A.isfinite().all()) and bool(s.B.isfinite().all()) for s in outcome.shifts.values()
    )
    if finite and (outcome.shifts or outcome.held):
        return []
    return ["the method found no finite update that lowers its loss"]


def own_prompts(request: EditRequest) -> list[Pair]:
    """Return what must be answered with the target: the prompt and its paraphrases."""
    return [(prompt, request.target) for prompt in (request.prompt, *request.paraphrases)]


def predict(env: Environment, request: EditRequest, local: bool = False) -> Prediction:
    """Measures the pending passes of ``env``; with ``local``, also on the request's own unrelated
    prompts, against the model without them."""
    pairs = [(place.prompt, place.answer or SILENCE) for place in request.locality]
    with torch.no_grad():
        with env.with_shifts():
            success = float(answered(env.backbone, own_prompts(request)).begins.float().mean())
        kl = _kl(env, pairs) if local and pairs else None
    return Prediction(success, kl)


class GuardedRollout:
    """A ``Rollout`` whose steps keep a guard's bounds; for a lifelong run in place of it.

    rejected: requests since the last reset that were not committed; halved: those that were made
    smaller. drift: of the last measurement, see ``Moved``.
    """

    def __init__(self, rollout: Rollout, guard: Guard, prompts: Sequence[str] = ()):
        self.rollout, self.guard = rollout, guard
        self.env, self.updater = rollout.env, rollout.updater
        self.watch = Watch(self.env, prompts)
        self.rejected, self.halved, self.drift = 0, 0, 0.0

    def reset(self) -> None:
        """Do as ``Rollout.reset``."""
        self.rollout.reset()
        self.rejected, self.halved, self.drift = 0, 0, 0.0

    def step(self, batch: EditBatch) -> Outcome:
        """Do as ``Rollout.step``; of a batch that is rejected nothing is committed, and its outcome
        touches no module."""
        outcome = self.rollout.propose(batch)
        odd = unusable(outcome) if outcome.shifts else []
        verdict = settle(self.env, self.watch, self.guard, outcome) if not odd else None
        if verdict is None or verdict.reasons:
            self.env.drop()
            self.rejected += len(batch)
            none = torch.zeros_like(outcome.mask)
            return dataclasses.replace(outcome, mask=none, shifts={}, signals=None, held=False)
        self.rollout.commit(verdict.outcome)
        if verdict.moved is not None:
            self.watch.accept()
            self.drift = verdict.moved.drift
        self.halved += len(batch) * (verdict.scale < 1)
        return verdict.outcome


@torch.no_grad()
def _holding(env: Environment, requests: Sequence[EditRequest]) -> float:
    """Share of the requests whose answer is the most likely one token by token."""
    backbone, pairs = env.backbone, [(r.prompt, r.target) for r in requests]
    tokens = encode(backbone.tokenizer, pairs, padding_side="left").to(backbone.device)
    answers = env.answers(tokens)
    return float((mean_by_row(answer_hits(answers).float(), answers) == 1).float().mean())


def _kl(env: Environment, pairs: list[Pair]) -> float:
    backbone = env.backbone
    tokens = encode(backbone.tokenizer, pairs, padding_side="left").to(backbone.device)
    before = backbone.answers(tokens).logits.float().log_softmax(-1)
    return float(answer_kl(env.answers(tokens), before).mean())
