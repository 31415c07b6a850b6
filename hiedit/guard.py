"""What an edit would do, measured before it is committed, and the limits that it must keep.

Rollout.propose -> predict -> Guard.objections -> commit or drop
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hiedit.backbone.losses import answer_kl
from hiedit.checks import at_least
from hiedit.data.tokens import encode
from hiedit.evaluation.metrics import SILENCE, answered
from hiedit.rl.environment import Environment
from hiedit.types import EditRequest

Pair = tuple[str, str]  # prompt and answer


@dataclass(frozen=True)
class Prediction:
    """success: share of the request's own prompt and paraphrases that free greedy generation
    answers with the target. kl: mean KL of the edited from the present model on prompts that it
    should leave alone (nats per answer token); None where none were watched."""

    success: float
    kl: float | None


@dataclass(frozen=True)
class Guard:
    """Limits of one edit; None: no limit. An edit that breaks one is not committed.

    max_kl: nats per answer token. min_success: in [0, 1]. Both as in ``Prediction``.
    """

    max_kl: float | None = None
    min_success: float | None = None

    def __post_init__(self):
        if self.max_kl is not None:
            at_least("max_kl", self.max_kl, 0)
        if self.min_success is not None and not 0 <= self.min_success <= 1:
            raise ValueError(f"min_success={self.min_success!r}: it must lie in [0, 1]")

    def objections(self, prediction: Prediction) -> list[str]:
        """Why the edit must not be committed; empty if it may."""
        found = []
        if self.min_success is not None and not prediction.success >= self.min_success:
            found.append(
                f"success {prediction.success:.2f} is below min_success {self.min_success:g}"
            )
        if prediction.kl is not None and not math.isfinite(prediction.kl):
            found.append("the edited model's answers to unrelated prompts are not finite")
        elif self.max_kl is not None and prediction.kl is not None and prediction.kl > self.max_kl:
            found.append(
                f"KL {prediction.kl:.4f} on unrelated prompts is above max_kl {self.max_kl:g}"
            )
        return found


def own_prompts(request: EditRequest) -> list[Pair]:
    """What must be answered with the target: the prompt and its paraphrases."""
    return [(prompt, request.target) for prompt in (request.prompt, *request.paraphrases)]


def predict(env: Environment, request: EditRequest, watched: Sequence[Pair]) -> Prediction:
    """Measures the pending passes of ``env`` against the model without them.

    watched: prompts to leave alone, beside the request's own unrelated prompts.
    """
    local = [(place.prompt, place.answer or SILENCE) for place in request.locality]
    with torch.no_grad():
        with env.with_shifts():
            success = float(answered(env.backbone, own_prompts(request)).begins.float().mean())
        kl = _kl(env, [*local, *watched]) if local or watched else None
    return Prediction(success, kl)


def _kl(env: Environment, pairs: list[Pair]) -> float:
    backbone = env.backbone
    tokens = encode(backbone.tokenizer, pairs, padding_side="left").to(backbone.device)
    before = backbone.answers(tokens).logits.float().log_softmax(-1)
    return float(answer_kl(env.answers(tokens), before).mean())
