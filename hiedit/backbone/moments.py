"""Second moments of keys: on knowledge to preserve, and between phrasings of one fact."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hiedit.backbone.model import Backbone, at_tokens
from hiedit.backbone.signals import edit_tokens
from hiedit.types import TokenBatch


@torch.no_grad()
def key_moments(
    backbone: Backbone, batches: Iterable[TokenBatch], tokens: str | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """By module: (mean of ``k k^T`` [I, I], mean of ``|y|^2`` []) over all tokens but padding, or
    over those positions that ``edit_tokens`` calls ``tokens``.

    Raises:
        ValueError: if there is no token at all.
    """
    moments = {
        n: torch.zeros(m.in_features, m.in_features, device=backbone.device)
        for n, m in backbone.modules.items()
    }
    power = {n: torch.zeros((), device=backbone.device) for n in moments}
    count = 0
    for batch in batches:
        where = batch.attention.bool() if tokens is None else edit_tokens(batch, tokens)
        with backbone.capture() as (inputs, outputs):
            backbone.answers(batch)
        for name in moments:
            keys = at_tokens(inputs[name], where, batch.attention).float()
            moments[name] += keys.T @ keys
            power[name] += at_tokens(outputs[name], where, batch.attention).float().square().sum()
        count += int(where.sum())
    if count == 0:
        raise ValueError("key_moments: no prompts to preserve were given")
    return {n: (moments[n] / count, power[n] / count) for n in moments}


@torch.no_grad()
def phrasing_scatter(backbone: Backbone, facts: Iterable[TokenBatch]) -> dict[str, Tensor]:
    """By module, the covariance ``S`` [I, I] of the keys of one fact's phrasings around their mean,
    pooled over facts (the within-class scatter of Fisher's discriminant).

    facts: the phrasings of one fact each, all with the same answer, whose tokens are compared place
    by place. A fact with one phrasing, or whose answer is cut into tokens differently, is left out.

    Raises:
        ValueError: if no fact is left.
    """
    sums = {
        n: torch.zeros(m.in_features, m.in_features, device=backbone.device)
        for n, m in backbone.modules.items()
    }
    free = 0  # degrees of freedom
    for batch in facts:
        where = edit_tokens(batch, "answer")
        counts = where.sum(1)
        phrasings, places = len(counts), int(counts[0])
        if phrasings < 2 or bool((counts != places).any()):
            continue
        with backbone.capture() as (inputs, _):
            backbone.answers(batch)
        for name in sums:
            keys = at_tokens(inputs[name], where, batch.attention).float()
            keys = keys.view(phrasings, places, -1)
            around = (keys - keys.mean(0, keepdim=True)).flatten(0, 1)
            sums[name] += around.T @ around
        free += (phrasings - 1) * places
    if free == 0:
        raise ValueError("phrasing_scatter: no fact was given in two phrasings")
    return {n: total / free for n, total in sums.items()}
