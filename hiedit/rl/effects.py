"""What each editable module does on its own: the static part of layer selection."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hiedit.backbone.losses import answer_kl, answer_nll
from hiedit.data.tokens import encode
from hiedit.rl.environment import Environment
from hiedit.types import EditRequest, Shift
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
) -> Tensor:
    """[E, L]: the fall in loss when one module alone takes the shift, for each request.

    The loss is the mean cross-entropy of the edit and its paraphrases plus ``c_loc`` times the KL
    on its unrelated prompts, in nats, on the unedited model. One forward pass per request scores
    all modules: each is a copy of the sequences with its own mask. ``done`` is called after each.
    """
    names, backbone = updater.names, env.backbone
    rows = []
    for request in requests:
        edit = encode(backbone.tokenizer, [(request.prompt, request.target)], padding_side="left")
        signals = env.probe(edit.to(backbone.device), 1, updater.config.tokens).signals()
        shifts = updater(signals, torch.ones(1, len(names), device=backbone.device))
        near = [(place.prompt, place.answer) for place in request.locality if place.answer][:2]
        asked = [(p, request.target) for p in (request.prompt, *request.paraphrases[:2])]
        rows.append(_gain_by_module(env, shifts, names, asked, near, c_loc))
        done()
    return torch.stack(rows) if rows else torch.zeros(0, len(names), device=backbone.device)


def _gain_by_module(env, shifts, names, rows, near, c_loc) -> Tensor:
    tokenizer, device = env.backbone.tokenizer, env.backbone.device
    copies = len(names) + 1  # the last copy is the model without any shift
    batch = encode(tokenizer, [*rows, *near] * copies, padding_side="left").to(device)
    width = len(rows) + len(near)
    stacked = {}
    for column, name in enumerate(names):
        if name not in shifts:
            continue
        own = torch.zeros(copies * width, 1, device=device)
        own[column * width : (column + 1) * width] = 1.0
        shift = shifts[name]
        stacked[name] = Shift(shift.A, shift.B, own.expand(-1, shift.rank))
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
