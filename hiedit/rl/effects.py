"""Effects of editable modules, alone and together: the static part of layer selection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hiedit.backbone.losses import answer_kl, answer_nll
from hiedit.data.tokens import encode
from hiedit.policy.selectors import top_k_mask
from hiedit.rl.candidates import copied
from hiedit.rl.environment import Environment
from hiedit.rl.reference import Pair
from hiedit.rl.sequences import EditSequences
from hiedit.types import EditBatch, EditRequest
from hiedit.updaters.updater import Updater


def single_module_effects(
    env: Environment, updater: Updater, requests: Sequence[EditRequest], c_loc: float = 1.0
) -> Tensor:
    """[L]: mean over ``requests`` of ``effects_by_edit``; zeros where there are none."""
    found = effects_by_edit(env, updater, requests, c_loc)
    return found.sum(0) / max(1, len(found))


def effects_by_edit(
    env: Environment,
    updater: Updater,
    requests: Sequence[EditRequest],
    c_loc: float = 1.0,
    done: Callable[[], None] = lambda: None,
    masks: Tensor | None = None,
) -> Tensor:
    """[E, L]: the fall in loss when one module alone takes the shift, for each request; or [E, C]
    when each of ``masks`` [C, L] does: ``gain - c_loc * price`` of ``effects_apart``."""
    found = effects_apart(env, updater, requests, done, masks)
    return found.gain - c_loc * found.price


class Effects(NamedTuple):
    """Effects of masks on edits, in nats on the unedited model. gain: [E, C], fall in the mean
    cross-entropy of the edit and its paraphrases. price: [E, C], mean KL on unrelated prompts."""

    gain: Tensor
    price: Tensor


@torch.no_grad()
def effects_apart(
    env: Environment,
    updater: Updater,
    requests: Sequence[EditRequest],
    done: Callable[[], None] = lambda: None,
    masks: Tensor | None = None,
    contexts: Sequence[str] = (),
    watched: Sequence[Pair] = (),
    at_once: int = 0,
) -> Effects:
    """The ``Effects`` of one pass under each of ``masks`` [C, L] (None: each module alone), for
    each request.

    A forward pass scores many masks: each is a copy of the sequences with its own scale. ``done``
    is called after each request. contexts: what the edit is made behind too. watched: unrelated
    (prompt, answer) pairs beside the request's own. at_once: sequences in a forward pass (0: all).
    """
    names, backbone = updater.names, env.backbone
    every = torch.eye(len(names)) if masks is None else masks
    every = every.to(backbone.device)
    subject = updater.config.tokens == "subject"
    sequences = EditSequences(backbone.tokenizer, contexts, phrasings=False, subject=subject)
    rows = []
    for request in requests:
        edit = sequences.encode(EditBatch((request,)))
        signals = env.probe(edit.to(backbone.device), 1, updater.config.tokens).signals()
        shifts = updater(signals, torch.ones(1, len(names), device=backbone.device))
        near = [(place.prompt, place.answer) for place in request.locality if place.answer][:2]
        asked = [(p, request.target) for p in (request.prompt, *request.paraphrases[:2])]
        rows.append(_by_mask(env, shifts, names, every, asked, [*near, *watched], at_once))
        done()
    if not rows:
        none = torch.zeros(0, len(every), device=backbone.device)
        return Effects(none, none)
    return Effects(*(torch.stack(part) for part in zip(*rows, strict=True)))


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


def _by_mask(env, shifts, names, masks, rows, near, at_once) -> Effects:
    """The effects of each mask [C] on one edit. rows: what the edit is to say; near: what it is to
    leave alone."""
    tokenizer, device = env.backbone.tokenizer, env.backbone.device
    pairs = [*rows, *near]
    width = len(pairs)
    base = env.answers(encode(tokenizer, pairs, padding_side="left").to(device))
    before = answer_nll(base)[: len(rows)].mean()
    reference = base.take(len(rows), width).logits.float().log_softmax(-1)
    gain, price = [], []
    for some in masks.split(max(1, at_once // width) if at_once else len(masks)):
        batch = encode(tokenizer, pairs * len(some), padding_side="left").to(device)
        answers = env.answers(batch, copied(shifts, some, width, names))
        nll = answer_nll(answers).view(len(some), width)
        gain.append(before - nll[:, : len(rows)].mean(-1))
        for copy in range(len(some)):
            part = answers.take(copy * width + len(rows), (copy + 1) * width)
            price.append(answer_kl(part, reference).mean() if near else nll.new_zeros(()))
    return Effects(torch.cat(gain), torch.stack(price))
