"""Many masks of one edit, each scored by the whole option: as many passes as it takes by itself.

One pass more says where the loss falls fastest; the whole edit says what it has cost by the time it
holds, and whether it ever does.

Shapes: ``C`` candidate masks, ``L`` modules.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hiedit.config import ObjectiveConfig, SelectorConfig
from hiedit.policy.selectors import Selector
from hiedit.rl.candidates import sequence_loss
from hiedit.rl.objective import RewardBatch, squared_norm
from hiedit.rl.rollout import Rollout
from hiedit.types import Action, EditBatch, Shifts, Signals


def score_options(
    rollout: Rollout,
    config: ObjectiveConfig,
    batch: EditBatch,
    rewarded: RewardBatch,
    reference: Tensor | None,
    masks: Tensor,
) -> Tensor:
    """[C]: the loss (``Objective.__call__``) once ``batch`` has been edited under each of ``masks``
    [C, L], with ``config.c_pass`` for every pass after which it did not hold. Nothing stays
    pending.
    """
    env, updater, size = rollout.env, rollout.updater, rollout.selector.config.size_in_gate
    target, losses = rollout.passes.target_probability, []
    decided = Selector(updater.names, {}, SelectorConfig(kind="static"))
    alone = Rollout(env, decided, updater, rollout.passes, observe=False, contexts=rollout.contexts)

    def plain(signals: Signals, action: Action) -> Shifts:
        with torch.no_grad():
            return updater(signals, action.mask)

    for mask in masks:
        decided.set_static(mask)
        done = alone.propose(batch, plain)  # asks no prompts: the reward has a term for them
        with torch.no_grad():
            answers = env.answers(rewarded.tokens)
            loss = sequence_loss(answers, config, rewarded, reference, target)
            loss = loss + config.c_pass * max(0, done.passes - 1)
            if size and config.rho:
                loss = loss + config.rho * updater.energy(done.shifts).sum()
            if size and config.c_reg and done.shifts:
                loss = loss + config.c_reg * squared_norm(done.shifts)
        losses.append(loss)
        env.drop()
    return torch.stack(losses)
