"""Second moments of keys: on knowledge to preserve, and between phrasings of one fact."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from hiedit.backbone.model import Backbone, at_tokens
from hiedit.backbone.signals import edit_tokens
from hiedit.types import TokenBatch

SINK = 5.0  # times the median norm; what is longer is a sink
SINK_KEYS = 512  # of one module that are kept to find their directions
SINK_DIRECTIONS = 16


class KeyMoments(NamedTuple):
    """Statistics of one module's keys on prompts to preserve, sinks apart.

    moment: [I, I], mean of ``k k^T`` over the tokens counted that are no sinks. power: [], mean of
    ``|y|^2`` over the same. sinks: [s, I], an orthonormal basis of the sinks' keys, None where
    there are none. ratio: norm of the largest key over the median norm. typical: [], median of
    ``|y|^2``, which a few large outputs do not move. subjects: [I, I], mean of ``k k^T`` at the
    last tokens of subjects, None where the batches do not say where these are. own: [I, I], the
    moment on the model's own text alone, None where it has no weight of its own.
    """

    moment: Tensor
    power: Tensor
    sinks: Tensor | None = None
    ratio: float = 1.0
    typical: Tensor | None = None
    subjects: Tensor | None = None
    own: Tensor | None = None


@torch.no_grad()
def key_moments(
    backbone: Backbone, batches: Iterable[TokenBatch], tokens: str | None = None
) -> dict[str, KeyMoments]:
    """Return, by module, the moments of its keys over all tokens but padding, or over those
    positions that ``edit_tokens`` calls ``tokens``.

    A sink ("massive activation", Sun et al. 2024, arXiv 2402.17762) is a token whose key is more
    than ``SINK`` times as long as the median one. Its square would be all that a moment holds, so
    sinks are counted apart, wherever they stand: what moves them moves everything that attends to
    them. The median is that of the first batch.

    Raises:
        ValueError: if there is no token at all.
    """
    sums = {n: _Sums(m.in_features, backbone.device) for n, m in backbone.modules.items()}
    count = 0
    for batch in batches:
        where = batch.attention.bool()
        counted = where[where] if tokens is None else edit_tokens(batch, tokens)[where]
        subject = None
        if batch.subject is not None:
            columns = torch.arange(batch.ids.shape[1], device=batch.ids.device)
            subject = (columns == batch.subject[:, None])[where]
        inputs, outputs = backbone.captured(batch)
        for name, total in sums.items():
            keys = at_tokens(inputs[name], where, batch.attention).float()
            total.add(keys, at_tokens(outputs[name], where, batch.attention).float(), counted)
            if subject is not None:
                total.add_subjects(keys[subject])
        count += int(counted.sum())
    if count == 0:
        raise ValueError("key_moments: no prompts to preserve were given")
    return {n: total.moments() for n, total in sums.items()}


@torch.no_grad()
def typical_power(backbone: Backbone, batches: Iterable[TokenBatch]) -> dict[str, Tensor]:
    """Return, by module, the median of ``|y|^2`` [] over the tokens of ``batches`` but padding."""
    sizes: dict[str, list[Tensor]] = {n: [] for n in backbone.modules}
    for batch in batches:
        where = batch.attention.bool()
        _, outputs = backbone.captured(batch)
        for name, found in sizes.items():
            y = at_tokens(outputs[name], where, batch.attention).float()
            found.append(y.square().sum(-1))
    return {n: torch.cat(found).median() for n, found in sizes.items()}


class _Sums:
    """The running sums of one module's moments."""

    def __init__(self, features: int, device):
        self.moment = torch.zeros(features, features, device=device)
        self.power = torch.zeros((), device=device)
        self.count, self.median, self.largest = 0, None, 0.0
        self.sinks: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.subjects, self.subject_count = torch.zeros_like(self.moment), 0

    def add_subjects(self, keys: Tensor) -> None:
        """keys: [T, I], of the last tokens of subjects; after ``add`` of the same batch."""
        ordinary = keys[keys.square().sum(-1) <= SINK**2 * self.median]
        self.subjects += ordinary.T @ ordinary
        self.subject_count += len(ordinary)

    def add(self, keys: Tensor, outputs: Tensor, counted: Tensor) -> None:
        """keys: [T, I]. outputs: [T, O]. counted: bool [T], what the moment is of."""
        if not len(keys):
            return
        size = keys.square().sum(-1)
        if self.median is None:
            self.median = size.median().clamp(min=1e-20)
        self.largest = max(self.largest, float(size.max() / self.median))
        sink = size > SINK**2 * self.median
        if bool(sink.any()) and sum(map(len, self.sinks)) < SINK_KEYS:
            self.sinks.append(keys[sink])
        ordinary = counted & ~sink
        keys, outputs = keys[ordinary], outputs[ordinary]
        self.moment += keys.T @ keys
        energy = outputs.square().sum(-1)
        self.power += energy.sum()
        self.outputs.append(energy)
        self.count += len(keys)

    def moments(self) -> KeyMoments:
        count = max(1, self.count)
        sinks = _basis(torch.cat(self.sinks), self.median) if self.sinks else None
        typical = torch.cat(self.outputs).median() if self.outputs else self.power
        moment, power = self.moment / count, self.power / count
        named = self.subjects / self.subject_count if self.subject_count else None
        return KeyMoments(moment, power, sinks, self.largest**0.5, typical, named)


def _basis(keys: Tensor, ordinary: Tensor) -> Tensor:
    """[s, I]: orthonormal directions outside of which ``keys`` [T, I] are no longer than an
    ``ordinary`` key (its squared norm), ``SINK_DIRECTIONS`` at most."""
    _, values, directions = torch.linalg.svd(keys.double(), full_matrices=False)
    left = values.square().flip(0).cumsum(0).flip(0) / len(keys)  # mean energy from each one on
    wanted = int((left > ordinary).sum().clamp(1, SINK_DIRECTIONS))
    return directions[:wanted].to(keys.dtype)


@torch.no_grad()
def phrasing_scatter(backbone: Backbone, facts: Iterable[TokenBatch]) -> dict[str, Tensor]:
    """Return, by module, the covariance ``S`` [I, I] of the keys of one fact's phrasings around
    their mean, pooled over facts (the within-class scatter of Fisher's discriminant).

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
        inputs, _ = backbone.captured(batch)
        for name in sums:
            keys = at_tokens(inputs[name], where, batch.attention).float()
            keys = keys.view(phrasings, places, -1)
            around = (keys - keys.mean(0, keepdim=True)).flatten(0, 1)
            sums[name] += around.T @ around
        free += (phrasings - 1) * places
    if free == 0:
        raise ValueError("phrasing_scatter: no fact was given in two phrasings")
    return {n: total / free for n, total in sums.items()}
