"""Perplexity: how well a model reads plain text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from hiedit.backbone.losses import answer_nll
from hiedit.backbone.model import Backbone
from hiedit.data.passages import LIMIT
from hiedit.data.tokens import encode_prompts, pad_id
from hiedit.types import IGNORE, TokenBatch

WINDOW = 256  # tokens of a text that are read at once, and of all texts in one forward pass


@torch.no_grad()
def perplexity(backbone: Backbone, texts: Sequence[str], limit: int = LIMIT) -> float | None:
    """``exp`` of the mean negative log-likelihood of a token of ``texts``, given those before it.

    Long texts are cut into windows of 256 tokens (fewer where the model takes fewer), each read on
    its own; the first ``limit`` tokens count. None where no token has one before it.
    """
    total, count = 0.0, 0
    for group in _passes(list(_windows(backbone, texts, limit))):
        batch = _batch(group, pad_id(backbone.tokenizer))
        answers = backbone.answers(batch.to(backbone.device))
        sizes = torch.bincount(answers.row, minlength=answers.rows)
        total += float((answer_nll(answers) * sizes).sum())
        count += int(sizes.sum())
    return math.exp(min(total / count, 700.0)) if count else None


def _windows(backbone: Backbone, texts: Sequence[str], limit: int) -> Iterator[list[int]]:
    most = getattr(backbone.model.config, "max_position_embeddings", None) or WINDOW
    size, left = min(WINDOW, most), limit
    for text in texts:
        if left <= 0:
            return
        ids, _ = encode_prompts(backbone.tokenizer, [text])
        ids = ids[0, :left].tolist()
        left -= len(ids)
        yield from (part for i in range(0, len(ids), size) if len(part := ids[i : i + size]) > 1)


def _passes(windows: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Groups of windows of at most ``WINDOW`` tokens in all."""
    group: list[list[int]] = []
    for window in windows:
        if group and sum(map(len, group)) + len(window) > WINDOW:
            yield group
            group = []
        group.append(window)
    if group:
        yield group


def _batch(group: Sequence[list[int]], fill: int) -> TokenBatch:
    """Padded on the right; every token but the first of each is labelled."""
    width = max(map(len, group))
    ids = torch.full((len(group), width), fill)
    attention = torch.zeros_like(ids)
    for row, window in enumerate(group):
        ids[row, : len(window)] = torch.tensor(window)
        attention[row, : len(window)] = 1
    labels = ids.masked_fill(attention == 0, IGNORE)
    labels[:, 0] = IGNORE
    return TokenBatch(ids, attention, labels, torch.arange(len(group)))
