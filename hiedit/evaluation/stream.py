"""The prompts of one stream, asked of a model before and after edits: every score, per request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hiedit.backbone.model import Backbone
from hiedit.evaluation.metrics import continuations, decide, ends_text, until_end
from hiedit.evaluation.reading import Path, Reading, paths, read
from hiedit.evaluation.scores import SCORES, Scores
from hiedit.evaluation.words import Match
from hiedit.types import EditRequest

UNGUIDED = 3  # tokens compared where no gold answer says how many
KEPT = 1 << 28  # log-probabilities kept of the unedited model at most, two bytes each

NAN = float("nan")


@dataclass(frozen=True)
class Measured:
    """Per-request values, each [E] in the order of the stream; NaN where there is nothing to ask.
    All but the last three are means over the request's prompts; see docs/metrics.md.

    es, gs: share of prompts whose greedy continuation begins with the new answer. *_end: and ends
    there. ls: agrees with the unedited model. *_tf: the same by token. *_prob, *_pos: the published
    comparisons of new and old answer. kl: from the unedited model, nats per token.
    kept, known, asked: how many unrelated prompts have the gold answer still, had it before, have
    one at all.
    """

    es: Tensor
    gs: Tensor
    ls: Tensor
    es_end: Tensor
    gs_end: Tensor
    es_tf: Tensor
    gs_tf: Tensor
    ls_tf: Tensor
    es_prob: Tensor
    gs_prob: Tensor
    ls_prob: Tensor
    es_pos: Tensor
    gs_pos: Tensor
    ls_pos: Tensor
    kl: Tensor
    kept: Tensor
    known: Tensor
    asked: Tensor

    def scores(self, rows: slice | Tensor = slice(None)) -> Scores:
        """Means over ``rows`` of the stream, a slice or bool [E]; requests without such a prompt
        are left out."""
        return scores_of(vars(self), rows)


def scores_of(values: Mapping[str, Tensor], rows: slice | Tensor = slice(None)) -> Scores:
    """The scores of the columns in ``values``, named as in ``Measured``; others are None."""

    def share(part: str, whole: str) -> float | None:
        if part not in values:
            return None
        part, whole = (values[name][rows].nansum() for name in (part, whole))
        return float(part / whole) if whole else None

    named = {name: mean(values[name.lower()][rows]) for name in SCORES if name.lower() in values}
    return Scores(**named, LS_gold=share("kept", "known"), LS_known=share("known", "asked"))


def mean(values: Tensor) -> float | None:
    """Return the mean of those that are numbers; None where there are none."""
    values = values[~values.isnan()]
    return float(values.mean()) if values.numel() else None


@dataclass(frozen=True)
class _Question:
    """One prompt of a request, with every path along which it is read.

    new, old: the new answer, and the one it competes with (along itself, compared with the other).
    """

    owner: int
    pair: tuple[str, str]
    new: Path
    old: Path | None
    first: bool  # of its kind in the request


@dataclass(frozen=True)
class Neighbour:
    """One unrelated prompt. said: the unedited model's answer. best: what it read along it (equal
    to it but for rounding). gold: where the unedited model gave it. asked: there is a gold answer.
    """

    owner: int
    pair: tuple[str, str | None]
    said: Path
    best: tuple[int, ...]
    gold: Path | None
    asked: bool
    new: Path | None
    old: Path | None
    first: bool


class StreamProbe:
    """The prompts of one stream with what the unedited model says to them; build it before the
    first edit, share it between methods. batch: sequences a forward pass."""

    def __init__(self, backbone: Backbone, requests: Sequence[EditRequest], batch: int = 128):
        self.backbone, self.requests, self.batch = backbone, tuple(requests), batch
        own = [(i, r.prompt) for i, r in enumerate(self.requests)]
        held = [(i, p) for i, r in enumerate(self.requests) for p in r.heldout]
        self._edits, self._heldout = self._questions(own), self._questions(held)
        self.neighbours = self._neighbours()
        self.before = self.measure(len(self.requests))

    def measure(self, upto: int) -> Measured:
        """Ask the model as it is now about the first ``upto`` requests."""
        near = [n for n in self.neighbours if n.owner < upto]
        return Measured(**self._columns(range(upto), near))

    def edits(self, rows: range) -> dict[str, Tensor]:
        """The columns of efficacy and generalisation alone, of the requests ``rows``."""
        return self._columns(rows, None)

    def _columns(self, rows: range, near: Sequence[Neighbour] | None) -> dict[str, Tensor]:
        """Each [len(rows)]; locality is left out where ``near`` is None."""
        questions = [[q for q in g if q.owner in rows] for g in (self._edits, self._heldout)]
        asked = [p for group in questions for q in group for p in (q.new, q.old) if p]
        asked += [p for n in near or () for p in (n.said, n.gold, n.new, n.old) if p]
        found = dict(zip(asked, read(self.backbone, asked, self.batch), strict=True))
        pairs = {q.new: q.pair for group in questions for q in group}
        pairs |= {n.gold: n.pair for n in near or () if n.gold}
        readings = [found[path] for path in pairs]
        matches = decide(self.backbone, list(pairs.values()), readings, self.batch)
        given = dict(zip(pairs, matches, strict=True))
        values = {} if near is None else _local(near, found, given, rows)
        for kind, group in zip(("es", "gs"), questions, strict=True):
            values |= _asked(kind, group, found, given, rows)
        return values

    def agrees(self, near: Sequence[Neighbour]) -> list[bool]:
        """Tell whether the model as it is now answers each unrelated prompt as LS wants it."""
        found = read(self.backbone, [n.said for n in near], self.batch)
        return [r.best == n.best for r, n in zip(found, near, strict=True)]

    def kl(self) -> float:
        """Mean KL (nats per token) of the model as it is now from the unedited one."""
        return mean(self.measure(len(self.requests)).kl) or 0.0

    def _questions(self, places: list[tuple[int, str]]) -> list[_Question]:
        requests, tokenizer = self.requests, self.backbone.tokenizer
        pairs = [(prompt, requests[i].target) for i, prompt in places]
        new = paths(tokenizer, pairs, after=True)
        rivals = _rivals(tokenizer, [(p, requests[i].old_target) for i, p in places], new)
        seen: set[int] = set()
        found = []
        for (i, _), pair, (one, other) in zip(places, pairs, rivals, strict=True):
            found.append(_Question(i, pair, one, other, i not in seen))
            seen.add(i)
        return found

    def _neighbours(self) -> list[Neighbour]:
        tokenizer, requests = self.backbone.tokenizer, self.requests
        places = [(i, p) for i, r in enumerate(requests) for p in r.locality]
        pairs = [(p.prompt, p.answer) for _, p in places]
        gold = _some(tokenizer, pairs, after=True)
        counts = [UNGUIDED if g is None else len(g.answer) for g in gold]
        vocabulary = self.backbone.model.get_output_embeddings().weight.shape[0]
        every = max(1, -(-sum(counts) * vocabulary // KEPT))  # of how many prompts one is kept
        keep = [k % every == 0 for k in range(len(places))]
        given, said = self._gold(pairs, gold, keep)
        left = [k for k in range(len(places)) if k not in said]
        said |= zip(left, self._continued(pairs, counts, keep, left), strict=True)
        old = [
            # a neighbour in CounterFact's sense: the old answer is true of it
            (p.prompt, p.answer if p.answer == requests[i].old_target else None)
            for i, p in places
        ]
        new = paths(tokenizer, [(p.prompt, requests[i].target) for i, p in places])
        rivals = _rivals(tokenizer, old, new)
        first = {i: k for k, (i, _) in reversed(list(enumerate(places)))}
        return [
            Neighbour(
                owner=i,
                pair=pairs[k],
                said=said[k][0],
                best=said[k][1],
                gold=gold[k] if k in given else None,
                asked=gold[k] is not None,
                new=rivals[k][0] if rivals[k][1] else None,
                old=rivals[k][1],
                first=first[i] == k,
            )
            for k, (i, _) in enumerate(places)
        ]

    def _gold(self, pairs, gold: list[Path | None], keep: list[bool]):
        """Return which gold answers the unedited model gives; and by place what it says instead,
        with what is read along it, where that is seen without going on."""
        there = [k for k, path in enumerate(gold) if path is not None]
        asked = [replace(gold[k], keep=keep[k]) for k in there]
        found = read(self.backbone, asked, self.batch)
        matches = decide(self.backbone, [pairs[k] for k in there], found, self.batch)
        given = {k for k, m in zip(there, matches, strict=True) if m.begins}
        said = {}
        for k, reading in zip(there, found, strict=True):
            path, hits = reading.path, reading.hits
            right = next((i for i, hit in enumerate(hits) if not hit), len(hits))
            best = until_end(self.backbone, reading.best[: right + 1][: len(hits)])
            if len(best) == len(hits) or ends_text(self.backbone, best[-1]):
                kept = reading.kept[: len(best)].clone() if keep[k] else None
                ids = path.ids[: path.start] + best
                said[k] = Path(ids, path.start, reference=kept), best
        return given, said

    def _continued(self, pairs, counts, keep, left: list[int]) -> list[tuple[Path, tuple]]:
        """Return what the model says after the prompts ``left``, and what is read along it."""
        prompts = [pairs[k][0] for k in left]
        said = continuations(self.backbone, prompts, [counts[k] for k in left], self.batch)
        asked = [replace(path, keep=keep[k]) for path, k in zip(said, left, strict=True)]
        found = read(self.backbone, asked, self.batch)
        return [(replace(r.path, keep=False, reference=r.kept), r.best) for r in found]


Found = Mapping[Path, Reading]
Given = Mapping[Path, Match]


def _asked(
    kind: str, group: list[_Question], found: Found, given: Given, rows: range
) -> dict[str, Tensor]:
    """The columns of ``kind`` (es or gs), each [len(rows)]."""
    new = [found[q.new] for q in group]
    old = [found[q.old] if q.old else None for q in group]
    columns = {
        "": [float(given[q.new].begins) for q in group],
        "_end": [float(given[q.new].ends) for q in group],
        "_tf": [n.accuracy for n in new],
        "_prob": [
            NAN if o is None else float(n.mean_logp > o.mean_logp)
            for n, o in zip(new, old, strict=True)
        ],
        "_pos": [_share(n.beats) if q.first else NAN for q, n in zip(group, new, strict=True)],
    }
    owners = [q.owner for q in group]
    return {kind + k: _by_request(owners, column, rows) for k, column in columns.items()}


def _local(near: list[Neighbour], found: Found, given: Given, rows: range) -> dict[str, Tensor]:
    """The columns of locality, each [len(rows)]."""
    said = [found[n.said] for n in near]
    same = [
        [a == b for a, b in zip(s.best, n.best, strict=True)]
        for s, n in zip(said, near, strict=True)
    ]
    both = [(found[n.old], found[n.new]) if n.old else None for n in near]
    columns = {
        "ls": [float(all(s)) for s in same],
        "ls_tf": [_share(s) for s in same],
        "ls_prob": [NAN if b is None else float(b[0].mean_logp > b[1].mean_logp) for b in both],
        "ls_pos": [
            _share(b[0].beats) if b is not None and n.first else NAN
            for n, b in zip(near, both, strict=True)
        ],
        "kl": [NAN if s.kl is None else s.kl for s in said],
    }
    owners = [n.owner for n in near]
    values = {k: _by_request(owners, column, rows) for k, column in columns.items()}
    counted = {
        "kept": [n.owner for n in near if n.gold and given[n.gold].begins],
        "known": [n.owner for n in near if n.gold],
        "asked": [n.owner for n in near if n.asked],
    }
    for name, owned in counted.items():
        owned = torch.tensor(owned, dtype=torch.int64)
        values[name] = torch.bincount(owned, minlength=len(rows)).float()
    return values


def _rivals(tokenizer, others, new: list[Path]) -> list[tuple[Path, Path | None]]:
    """Each path of ``new`` and the path of the other answer (None where there is none), each with
    the other as its rival."""
    old = _some(tokenizer, others)
    found = []
    for one, other in zip(new, old, strict=True):
        if other is None or other.answer == one.answer:
            found.append((one, None))
            continue
        found.append(
            (
                Path(one.ids, one.start, one.after, other.answer),
                Path(other.ids, other.start, other.after, one.answer),
            )
        )
    return found


def _some(tokenizer, pairs, after: bool = False) -> list[Path | None]:
    """Paths of the pairs that have an answer."""
    found = iter(paths(tokenizer, [p for p in pairs if p[1]], after))
    return [next(found) if answer else None for _, answer in pairs]


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else NAN


def _by_request(owners: list[int], values: list[float], rows: range) -> Tensor:
    """[len(rows)]: means over each request's prompts that have a value; NaN where none has."""
    value = torch.tensor(values, dtype=torch.float32)
    owner = torch.tensor(owners, dtype=torch.int64) - rows.start
    there = ~value.isnan()
    owner, value = owner[there], value[there]
    count = torch.bincount(owner, minlength=len(rows))
    return torch.zeros(len(rows)).index_add(0, owner, value) / count
