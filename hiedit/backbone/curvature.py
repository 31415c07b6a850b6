"""Fisher information of modules' outputs: what a change there costs, in nats."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hiedit.backbone.model import Backbone, at_tokens
from hiedit.backbone.moments import SINK
from hiedit.types import IGNORE, TokenBatch


def output_curvature(
    backbone: Backbone, batches: Iterable[TokenBatch], seed: int = 0
) -> dict[str, Tensor]:
    """Return, by module, ``F`` [O, O]: mean of ``g g^T`` over tokens, sinks and padding apart.

    ``g`` is the gradient at the module's output of ``-sum_s log p(y_s)`` over all later positions
    ``s``, with ``y_s`` drawn from the model itself: the Fisher information, not the empirical one
    (Kunstner et al. 2019, arXiv 1905.12558). ``1/2 d^T F d`` is the KL in nats, summed over later
    positions, of a small change ``d`` of one output. The draws are the same for the same seed.

    Raises:
        ValueError: if there is no token at all.
    """
    draw = torch.Generator(device=backbone.device).manual_seed(seed)
    sums = {
        n: torch.zeros(m.out_features, m.out_features, device=backbone.device)
        for n, m in backbone.modules.items()
    }
    counts = dict.fromkeys(sums, 0)
    for batch in batches:
        every = _all_predicted(batch)
        with torch.enable_grad(), backbone.capture() as (inputs, outputs):
            logits = backbone.answers(every).logits.float()
            said = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)
            loss = -logits.log_softmax(-1).gather(-1, said).sum()
            outputs = {n: outputs[n] for n in sums if n in outputs}
            grads = torch.autograd.grad(loss, list(outputs.values()))
        where = batch.attention.bool()
        for name, grad in zip(outputs, grads, strict=True):
            size = at_tokens(inputs[name], where, batch.attention).float().square().sum(-1)
            rows = at_tokens(grad, where, batch.attention).float()
            rows = rows[size <= SINK**2 * size.median()]
            sums[name] += rows.T @ rows
            counts[name] += len(rows)
    if not any(counts.values()):
        raise ValueError("output_curvature: no texts were given")
    return {n: total / max(1, counts[n]) for n, total in sums.items()}


def _all_predicted(batch: TokenBatch) -> TokenBatch:
    """``batch`` with every token but the first of each sequence for an answer."""
    first = batch.attention.cumsum(-1) <= 1
    labels = batch.ids.masked_fill(first | (batch.attention == 0), IGNORE)
    return TokenBatch(batch.ids, batch.attention, labels, batch.edit, batch.subject)
