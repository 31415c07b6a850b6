"""Many masks of one pass, scored on the true objective in one batched forward.

The shifts of one edit do not depend on the mask but for their scale, so every mask is a copy of
the reward's sequences with its own scale, and the factors are shared.

Shapes: ``C`` candidate masks, ``L`` modules, ``N`` sequences of the reward, ``r`` rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hiedit.backbone.losses import AnswerLogits, answer_confidence, answer_kl, answer_nll
from hiedit.config import ObjectiveConfig
from hiedit.policy.estimators import masks_of
from hiedit.policy.selectors import Selector
from hiedit.rl.environment import Environment
from hiedit.rl.objective import RewardBatch, squared_norm
from hiedit.types import Action, Shift, Shifts, TokenBatch
from hiedit.updaters.updater import Updater


def copied(shifts: Shifts, masks: Tensor, width: int, names: list[str]) -> Shifts:
    """``shifts`` at full size under one mask per block of ``width`` sequences: scale [C*N, r]."""
    stacked = {}
    for name, shift in shifts.items():
        own = masks[:, names.index(name)].repeat_interleave(width)[:, None].to(shift.A.dtype)
        stacked[name] = Shift(shift.A.detach(), shift.B.detach(), own.expand(-1, shift.rank))
    return stacked


def repeated(batch: TokenBatch, copies: int) -> TokenBatch:
    """``copies`` of ``batch`` one after the other."""
    return TokenBatch(
        batch.ids.repeat(copies, 1),
        batch.attention.repeat(copies, 1),
        batch.labels.repeat(copies, 1),
        batch.edit.repeat(copies),
    )


@torch.no_grad()
def score_masks(
    env: Environment,
    updater: Updater,
    config: ObjectiveConfig,
    batch: RewardBatch,
    reference: Tensor | None,
    shifts: Shifts,
    masks: Tensor,
    target: float,
    size: bool = True,
) -> Tensor:
    """[C]: the loss (``Objective.__call__``) that each mask [C, L] of a single edit would have.

    target: the probability above which the edit holds. size: whether energy and norm count.
    """
    copies, width = len(masks), len(batch.tokens)
    stacked = copied(shifts, masks, width, updater.names)
    answers = env.answers(repeated(batch.tokens, copies), stacked)
    losses = []
    for copy in range(copies):
        own = answers.take(copy * width, (copy + 1) * width)
        losses.append(sequence_loss(own, config, batch, reference, target))
    total = torch.stack(losses)
    full = {n: Shift(s.A.detach(), s.B.detach()) for n, s in shifts.items()}
    if size and config.rho:
        total += config.rho * masks @ updater.energy(full)
    if size and config.c_reg:
        for name, shift in full.items():
            norm = squared_norm({name: shift})
            total += config.c_reg * norm * masks[:, updater.names.index(name)]
    return total


def sequence_loss(
    answers: AnswerLogits,
    config: ObjectiveConfig,
    batch: RewardBatch,
    reference: Tensor | None,
    target: float,
) -> Tensor:
    """Scalar: the reward's terms that its sequences decide, all but energy and norm."""
    edit = answers.take(0, batch.edits)
    total = (answer_nll(edit) * batch.weights[: batch.edits]).sum()
    if reference is not None:
        kl = answer_kl(answers.take(batch.edits, answers.rows), reference)
        total = total + config.c_loc * (kl * batch.weights[batch.edits :]).sum()
    if config.c_pass:
        total = total + config.c_pass * float(answer_confidence(edit)[0] <= target)
    return total


def policy_loss(selector: Selector, action: Action, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Scalar whose gradient trains a policy that wants its draws scored.

    score: masks [C, L] -> their losses [C] on the true objective.

    Raises:
        ValueError: if the step has several edits, whose shifts depend on each other's masks.
    """
    c = selector.config
    if len(action.mask) != 1:
        raise ValueError(
            f"train.n_edits={len(action.mask)}: estimator={c.estimator!r} scores the masks of one "
            "edit at a time; set train.n_edits=1, or method.selector.estimator=straight_through"
        )
    masks = masks_of(action.draws)[:, 0]
    if c.baseline == "self_critical" and c.estimator != "counterfactual":
        losses = score(torch.cat([masks, selector.mode(action.logits)]))
        return selector.loss(action, losses[:-1], losses[-1])
    return selector.loss(action, score(masks))
