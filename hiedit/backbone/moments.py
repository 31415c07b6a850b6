"""Second moments of the keys on knowledge to preserve."""

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
