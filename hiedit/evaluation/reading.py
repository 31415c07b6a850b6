"""Predictions of a model along given token sequences, with as few forward passes as that takes.

Answers to one prompt share it: a causal model that is given the longest sequence has been given
all that it begins with. So sequences that are the beginning of others cost nothing, and after a
prompt the first tokens of any number of answers are read off one position.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hiedit.backbone.losses import AnswerLogits
from hiedit.backbone.model import Backbone
from hiedit.data.tokens import encode, pad_id
from hiedit.types import IGNORE, TokenBatch

POSITIONS = 4  # a forward pass gives logits at no more than so many times ``batch`` positions


@dataclass(frozen=True, eq=False)
class Path:
    """A prompt and an answer in tokens; two are the same only if they are one object.

    ids: both. start: where the answer begins (at least 1). after: what follows the answer is asked
    as well. rival: another answer's tokens, compared place by place. reference: [n, V],
    log-probabilities at the n tokens of the answer, to measure KL from. keep: return such.
    """

    ids: tuple[int, ...]
    start: int
    after: bool = False
    rival: tuple[int, ...] = ()
    reference: Tensor | None = None
    keep: bool = False

    @property
    def answer(self) -> tuple[int, ...]:
        return self.ids[self.start :]

    @property
    def inputs(self) -> tuple[int, ...]:
        """Return what the model must be given."""
        return self.ids if self.after else self.ids[:-1]


@dataclass(frozen=True)
class Reading:
    """best: the most likely token at each of the answer's places, and after it where asked.
    logp: log-probability of each of the answer's tokens, nats. beats: whether its logit is above
    the rival's, as far as both go. kl: nats per token, None without a reference. kept: [n, V] in
    half precision, None unless asked."""

    path: Path
    best: tuple[int, ...]
    logp: tuple[float, ...]
    beats: tuple[bool, ...] = ()
    kl: float | None = None
    kept: Tensor | None = None

    @property
    def hits(self) -> tuple[bool, ...]:
        return tuple(b == a for b, a in zip(self.best, self.path.answer, strict=False))

    @property
    def accuracy(self) -> float:
        """Share of the answer's tokens that are the most likely one."""
        return sum(self.hits) / len(self.hits)

    @property
    def mean_logp(self) -> float:
        return sum(self.logp) / len(self.logp)


def paths(tokenizer, pairs: Sequence[tuple[str, str]], after: bool = False) -> list[Path]:
    """``pairs`` of prompt and answer in tokens, as ``encode`` joins them."""
    if not pairs:
        return []
    batch = encode(tokenizer, pairs)
    lengths = batch.attention.sum(1).tolist()
    starts = (batch.labels != IGNORE).int().argmax(1).tolist()
    rows = zip(batch.ids.tolist(), lengths, starts, strict=True)
    return [Path(tuple(ids[:length]), start, after) for ids, length, start in rows]


@torch.no_grad()
def read(backbone: Backbone, asked: Sequence[Path], batch: int = 128) -> list[Reading]:
    """Return what the model as it is now predicts along each path; ``batch`` sequences a forward
    pass."""
    owner = _longest([path.inputs for path in asked])
    members: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, path in enumerate(asked):
        members[owner[path.inputs]].append(index)
    found: dict[int, Reading] = {}
    for group in _batches(sorted(members, key=len), asked, members, batch):
        tokens, columns = _batch(backbone, group, asked, members)
        said = backbone.answers(tokens.to(backbone.device))
        places = {place: i for i, place in enumerate(columns)}
        _readings(
            said, asked, [(members[ids], row) for row, ids in enumerate(group)], places, found
        )
    return [found[index] for index in range(len(asked))]


def _longest(inputs: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Find for each sequence the longest one that begins with it (any of those)."""
    owner, last = {}, ()
    for ids in sorted(set(inputs), reverse=True):  # what begins with it stands just before it
        if last[: len(ids)] != ids:
            last = ids
        owner[ids] = last
    return owner


def _span(path: Path) -> range:
    """The positions whose logits are wanted."""
    return range(path.start - 1, len(path.inputs))


def _batches(order, asked, members, batch):
    group, wanted = [], 0
    for ids in order:
        count = len({p for i in members[ids] for p in _span(asked[i])})
        if group and (len(group) == batch or wanted + count > POSITIONS * batch):
            yield group
            group, wanted = [], 0
        group.append(ids)
        wanted += count
    if group:
        yield group


def _batch(backbone, group, asked, members) -> tuple[TokenBatch, list[tuple[int, int]]]:
    """The sequences padded on the left, each with one token more whose label asks for what
    follows; and (row, position) of the logits that come back, in their order."""
    width = max(map(len, group)) + 1
    fill = pad_id(backbone.tokenizer)
    ids = torch.full((len(group), width), fill)
    attention = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE)
    columns = []
    for row, sequence in enumerate(group):
        first = width - 1 - len(sequence)
        ids[row, first:-1] = torch.tensor(sequence)
        attention[row, first:] = 1
        for position in sorted({p for i in members[sequence] for p in _span(asked[i])}):
            labels[row, first + position + 1] = ids[row, first + position + 1]
            columns.append((row, position))
    return TokenBatch(ids, attention, labels, torch.arange(len(group))), columns


def _readings(said: AnswerLogits, asked, rows, places, found) -> None:
    logits = said.logits.float()
    best, total = logits.argmax(-1).tolist(), logits.logsumexp(-1)
    chosen, rivals, spans = [], [], []
    for indices, row in rows:
        for index in indices:
            path = asked[index]
            at = [places[row, p] for p in _span(path)]
            spans.append((index, at))
            chosen += zip(at, path.answer, strict=False)
            rivals += zip(at, path.answer, path.rival, strict=False)
    logp = iter((_at(logits, chosen) - total[[at for at, _ in chosen]]).tolist())
    over = iter(())
    if rivals:
        own, other = ([(r[0], r[k]) for r in rivals] for k in (1, 2))
        over = iter((_at(logits, own) > _at(logits, other)).tolist())
    for index, at in spans:
        path = asked[index]
        count = len(path.answer)
        kl = kept = None
        if path.reference is not None or path.keep:
            now = logits[at[:count]] - total[at[:count], None]
            kept = now.half().cpu() if path.keep else None
            kl = None if path.reference is None else _kl(path.reference.to(now.device), now)
        found[index] = Reading(
            path,
            tuple(best[i] for i in at),
            tuple(next(logp) for _ in range(count)),
            tuple(next(over) for _ in range(min(count, len(path.rival)))),
            kl,
            kept,
        )


def _at(logits: Tensor, places: Sequence[tuple[int, int]]) -> Tensor:
    rows, tokens = zip(*places, strict=True)
    return logits[list(rows), list(tokens)]


def _kl(reference: Tensor, now: Tensor) -> float:
    reference = reference.float()
    return float((reference.exp() * (reference - now)).sum(-1).mean())
