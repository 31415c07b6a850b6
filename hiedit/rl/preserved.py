"""Prompts that an edit has to leave standing: it is done only when some of that, asked beside it,
holds.

What the protection keeps apart (``k^T P k``) still drifts over hundreds of edits, a little with
each. So an option ends when its edit holds *and* some preserved prompts still get the base model's
answer, and some earlier edits theirs; the same shift then serves all of them. Of those that are
drawn anew for every edit, the model is asked how sure it is, and the least sure are kept: what is
lost is found and mended. What may be about the edited fact is left out: it would take the edit
back.
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from hiedit.backbone.losses import answer_confidence
from hiedit.backbone.model import Backbone
from hiedit.config import PassesConfig
from hiedit.data.tokens import encode
from hiedit.rl.reference import Pair
from hiedit.types import EditBatch, EditRequest

RARE = 0.02  # share of the prompts; a word in more of them does not tell what a prompt is about
FEW = 3  # prompts, or as few as this
SHORT = 3  # letters; words of no more (of, in, is) do not tell what a prompt is about

Sure = Callable[[Sequence[Pair]], Tensor]  # [N]: the smallest probability in each pair's answer
Drawn = tuple[int, int, list[Pair]]  # (edit of the batch, how many to ask, what was drawn)


class Preserved:
    """Draws, for every edit, ``passes.preserved`` of ``pairs`` and ``passes.rehearsed`` of the
    earlier edits in effect: the least sure of ``passes.screened`` of each. What is drawn depends
    on the edit and the edits in effect alone: an edit that is repeated draws the same.

    A pair may be about an edited fact, and is left out from then on, where its prompt names the
    edit's subject or, if the edit's own prompt names none, shares a rare word with that. An
    earlier edit is left out for the same reasons, unless the relations of both are known and
    differ; and where its prompt is the same.
    """

    def __init__(self, pairs: Iterable[Pair] = (), passes: PassesConfig | None = None):
        self.passes, self.pairs = passes or PassesConfig(), tuple(pairs)
        self._naming = _Naming()
        for i, (prompt, _) in enumerate(self.pairs):
            self._naming.add(i, prompt)
        self.reset()

    @property
    def asks(self) -> bool:
        """Tell whether anything may ever be asked."""
        return bool(self.passes.rehearsed or self.passes.preserved and self.pairs)

    def draw(self, batch: EditBatch, sure: Sure | None = None) -> tuple[list[Pair], list[int]]:
        """(pairs, the edit of the batch that each belongs to); ``sure`` screens what is drawn,
        without it as few are drawn as are asked."""
        drawn = self._preserved(batch, sure) + self._rehearsed(batch, sure)  # per kind and edit
        if sure is not None and any(len(some) > asked for _, asked, some in drawn):
            screened = sure([pair for _, _, some in drawn for pair in some])
            probability = iter(screened.nan_to_num(nan=0.0).tolist())
            for _, asked, some in drawn:
                least = sorted((next(probability), i) for i in range(len(some)))[:asked]
                some[:] = [some[i] for _, i in least]
        drawn.sort(key=lambda found: found[0])
        pairs = [pair for _, _, some in drawn for pair in some]
        return pairs, [edit for edit, _, some in drawn for _ in some]

    def _preserved(self, batch: EditBatch, sure: Sure | None) -> list[Drawn]:
        asked = self.passes.preserved
        if not asked or not self.pairs:
            return []
        gone = self._edited.union(*(self.about(r) for r in batch.requests))
        left = [i for i in range(len(self.pairs)) if i not in gone]
        return [
            (edit, asked, [self.pairs[i] for i in self._sample("preserved", r, left, asked, sure)])
            for edit, r in enumerate(batch.requests)
        ]

    def _rehearsed(self, batch: EditBatch, sure: Sure | None) -> list[Drawn]:
        asked = self.passes.rehearsed
        if not asked or not self._earlier:
            return []
        gone = set().union(*(self._superseded(r) for r in batch.requests))
        left = [i for i in self._earlier if i not in gone]
        found = []
        for edit, request in enumerate(batch.requests):
            some = [self._earlier[i] for i in self._sample("earlier", request, left, asked, sure)]
            found.append((edit, asked, [(r.prompt, r.target) for r in some]))
        return found

    def _sample(self, kind: str, request: EditRequest, left, asked: int, sure) -> list[int]:
        draw = random.Random(f"{kind}/{request.prompt}/{request.target}")
        many = asked if sure is None else max(asked, self.passes.screened)
        return draw.sample(left, min(many, len(left)))

    def edited(self, requests: Iterable[EditRequest]) -> None:
        """These were committed."""
        for request in requests:
            self._edited.update(self.about(request))
            if self.passes.rehearsed:
                for i in self._superseded(request):
                    self._since.remove(i, self._earlier.pop(i).prompt)
                self._earlier[self._count] = request
                self._since.add(self._count, request.prompt)
                self._count += 1

    def reset(self) -> None:
        """Nothing is edited."""
        self._edited: set[int] = set()  # of the pairs, what may be about an edit
        self._earlier: dict[int, EditRequest] = {}  # in the order of the edits
        self._since = _Naming()
        self._count = 0

    def as_tensor(self) -> Tensor:
        """uint8 [bytes]: the pairs, as they travel and are saved with an editor's tensors."""
        return torch.tensor(list(json.dumps(self.pairs).encode()), dtype=torch.uint8)

    @staticmethod
    def pairs_in(tensor: Tensor) -> tuple[Pair, ...]:
        """Return what ``as_tensor`` holds; RuntimeError where it is none of its making."""
        try:
            pairs = json.loads(bytes(tensor.tolist()))
            return tuple((str(prompt), str(answer)) for prompt, answer in pairs)
        except (ValueError, TypeError) as error:
            raise RuntimeError(f"preserved.pairs: {error}") from None

    def about(self, request: EditRequest) -> set[int]:
        """Return which pairs may be about what ``request`` edits."""
        return self._about(request, self._naming)

    def _superseded(self, request: EditRequest) -> set[int]:
        """Return which earlier edits may be about what ``request`` edits."""
        found = self._about(request, self._since)
        return {i for i in found if not _differ(self._earlier[i], request)} | {
            i for i in self._since.naming(words(request.prompt))
            if self._earlier[i].prompt == request.prompt
        }  # fmt: skip

    def _about(self, request: EditRequest, prompts: _Naming) -> set[int]:
        named = words(request.subject or "")
        if named and named <= words(request.prompt):
            return prompts.naming(named)
        few = max(FEW, int(RARE * (len(self.pairs) + len(self._earlier))))
        rare = (word for word in telling(request.prompt) if self._many(word) <= few)
        return set().union(*(prompts.having(word) for word in rare))

    def _many(self, word: str) -> int:
        """Return how many prompts have it."""
        return len(self._naming.having(word)) + len(self._since.having(word))


class _Naming:
    """Prompts by the words that they name."""

    def __init__(self):
        self._holding: dict[str, set[int]] = defaultdict(set)  # word -> prompts with it

    def add(self, prompt: int, text: str) -> None:
        for word in words(text):
            self._holding[word].add(prompt)

    def remove(self, prompt: int, text: str) -> None:
        for word in words(text):
            self._holding[word].discard(prompt)

    def having(self, word: str) -> set[int]:
        """The prompts with ``word``; to look does not make an entry."""
        return self._holding.get(word, set())

    def naming(self, some: set[str]) -> set[int]:
        """The prompts with every word of ``some``."""
        return set.intersection(*map(self.having, some)) if some else set()


def _differ(one: EditRequest, other: EditRequest) -> bool:
    """Tell whether both say which relation they are of, and it is not the same."""
    return bool(one.relation and other.relation and one.relation != other.relation)


def words(text: str) -> set[str]:
    """The words of ``text`` in lower case."""
    return set(re.findall(r"\w+", text.lower()))


def telling(prompt: str) -> set[str]:
    """Return which words of ``prompt``, in lower case, may tell what it is about: names and
    numbers, or where there are none all words but short ones. A sentence's first word may be a
    name."""
    found = re.findall(r"\w+", prompt)
    names = [not word.islower() for word in found]
    if not any(names[1:]):
        names = [name or len(word) > SHORT for word, name in zip(found, names, strict=True)]
    return {word.lower() for word, name in zip(found, names, strict=True) if name}


@torch.no_grad()
def known_pairs(
    backbone: Backbone, pairs: Sequence[Pair], probability: float, batch: int = 64
) -> tuple[Pair, ...]:
    """Those whose answer the model gives, every token with more than ``probability``; to be asked
    of the base model, whose knowledge it is."""
    sure = sureness(backbone, pairs, batch) > probability
    return tuple(pair for pair, on in zip(pairs, sure.tolist(), strict=True) if on)


@torch.no_grad()
def sureness(backbone: Backbone, pairs: Sequence[Pair], batch: int = 64) -> Tensor:
    """[N]: the smallest probability of any token in each pair's answer, of the model as it is."""
    found = []
    for i in range(0, len(pairs), batch):
        tokens = encode(backbone.tokenizer, list(pairs[i : i + batch]), padding_side="left")
        found.append(answer_confidence(backbone.answers(tokens.to(backbone.device))))
    return torch.cat(found) if found else torch.zeros(0)
