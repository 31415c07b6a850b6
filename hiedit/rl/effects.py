"""What editable modules do on their own and together: the static part of layer selection."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hiedit.backbone.losses import answer_kl, answer_nll
from hiedit.data.tokens import encode
from hiedit.policy.selectors import top_k_mask
from hiedit.rl.candidates import copied
from hiedit.rl.environment import Environment
from hiedit.rl.sequences import EditSequences
from hiedit.types import EditBatch, EditRequest
from hiedit.updaters.updater import Updater


def single_module_effects(
    env: Environment, updater: Updater, requests: Sequence[EditRequest], c_loc: float = 1.0
) -> Tensor:
    """[L]: mean over ``requests`` of ``effects_by_edit``; zeros where there are none."""
    found = effects_by_edit(env, updater, requests, c_loc)
    return found.sum(0) / max(1, len(found))


@torch.no_grad()
def effects_by_edit(
    env: Environment,
    updater: Updater,
    requests: Sequence[EditRequest],
    c_loc: float = 1.0,
    done: Callable[[], None] = lambda: None,
    masks: Tensor | None = None,
) -> Tensor:
    """[E, L]: the fall in loss when one module alone takes the shift, for each request; or [E, C]
    when each of ``masks`` [C, L] does.

    The loss is the mean cross-entropy of the edit and its paraphrases plus ``c_loc`` times the KL
    on its unrelated prompts, in nats, on the unedited model. One forward pass per request scores
    all modules: each is a copy of the sequences with its own mask. ``done`` is called after each.
    """
    every = torch.eye(len(updater.names)) if masks is None else masks
    names, backbone = updater.names, env.backbone
    every = every.to(backbone.device)
    subject = updater.config.tokens == "subject"
    sequences = EditSequences(backbone.tokenizer, phrasings=False, subject=subject)
    rows = []
    for request in requests:
        edit = sequences.encode(EditBatch((request,)))
        signals = env.probe(edit.to(backbone.device), 1, updater.config.tokens).signals()
        shifts = updater(signals, torch.ones(1, len(names), device=backbone.device))
        near = [(place.prompt, place.answer) for place in request.locality if place.answer][:2]
        asked = [(p, request.target) for p in (request.prompt, *request.paraphrases[:2])]
        rows.append(_gain_by_mask(env, shifts, names, every, asked, near, c_loc))
        done()
    return torch.stack(rows) if rows else torch.zeros(0, len(every), device=backbone.device)


def subset_effects(
    env: Environment,
    updater: Updater,
    requests: Sequence[EditRequest],
    masks: Tensor,
    c_loc: float = 1.0,
) -> Tensor:
    """[C]: the mean over ``requests`` for sets of modules, ``masks`` [C, L]."""
    by_edit = effects_by_edit(env, updater, requests, c_loc, masks=masks)
    return by_edit.sum(0) / max(1, len(requests))


def best_subset(
    env: Environment, updater: Updater, requests: Sequence[EditRequest], k: int, rounds: int = 4
) -> Tensor:
    """[L] in {0, 1}: the best fixed ``k`` modules on ``requests``, by the mean fall in loss of one
    pass on the unedited model: the largest single-module effects, then the best swap of a module
    inside for one outside, at most ``rounds`` times or until none is better."""
    single = single_module_effects(env, updater, requests).nan_to_num(nan=-torch.inf)
    mask = top_k_mask(single[None], k)[0]
    for _ in range(rounds):
        inside, outside = mask.nonzero().squeeze(-1), (mask == 0).nonzero().squeeze(-1)
        tried = [mask]
        for i in inside:
            for o in outside:
                swapped = mask.clone()
                swapped[i], swapped[o] = 0.0, 1.0
                tried.append(swapped)
        masks = torch.stack(tried)
        found = subset_effects(env, updater, requests, masks).nan_to_num(nan=-torch.inf)
        best = int(found.argmax())
        if found[best] <= found[0]:
            break
        mask = masks[best]
    return mask


def _gain_by_mask(env, shifts, names, masks, rows, near, c_loc) -> Tensor:
    tokenizer, device = env.backbone.tokenizer, env.backbone.device
    masks = torch.cat([masks, masks.new_zeros(1, len(names))])  # at last the model as it is
    copies = len(masks)
    batch = encode(tokenizer, [*rows, *near] * copies, padding_side="left").to(device)
    width = len(rows) + len(near)
    stacked = copied(shifts, masks, width, names)
    answers = env.answers(batch, stacked)
    nll = answer_nll(answers).view(copies, width)
    loss = nll[:, : len(rows)].mean(-1)
    if near:
        base = answers.take((copies - 1) * width + len(rows), copies * width).logits
        reference = base.float().log_softmax(-1)
        for copy in range(copies):
            part = answers.take(copy * width + len(rows), (copy + 1) * width)
            loss[copy] += c_loc * answer_kl(part, reference).mean()
    return loss[-1] - loss[:-1]
