"""Prompts to preserve that an edit asks beside its own: it is done only when they hold as well.

What the protection keeps apart (``k^T P k``) still drifts over hundreds of edits, a little with
each. So an option ends when its edit holds *and* some preserved prompts, drawn anew for every edit,
still get the base model's answer; the same shift then serves both. Prompts that may be about what
was edited are asked no more: they would take the edit back.
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hiedit.backbone.losses import answer_confidence
from hiedit.backbone.model import Backbone
from hiedit.data.tokens import encode
from hiedit.rl.reference import Pair
from hiedit.types import EditBatch, EditRequest

RARE = 0.02  # share of the pairs; a word in more of them says nothing about what a prompt is about
FEW = 3  # pairs, or as few as this
SHORT = 3  # letters; words of no more (of, in, is) do not tell what a prompt is about


class Preserved:
    """Draws ``each`` of ``pairs`` for every edit, by it and the edits in effect alone: whatever was
    drawn before, an edit that is repeated draws the same.

    A pair may be about an edited fact, and is left out from then on, where its prompt names the
    edit's subject or, if the edit's own prompt names none, shares a rare word with that.
    """

    def __init__(self, pairs: Iterable[Pair] = (), each: int = 0):
        self.each, self.pairs = each, tuple(pairs)
        self._holding: dict[str, set[int]] = defaultdict(set)  # word -> pairs with it
        for i, (prompt, _) in enumerate(self.pairs):
            for word in words(prompt):
                self._holding[word].add(i)
        self._edited: set[int] = set()

    def draw(self, batch: EditBatch) -> tuple[list[Pair], list[int]]:
        """(pairs, the edit of the batch that each belongs to)."""
        if not self.each or not self.pairs:
            return [], []
        gone = self._edited.union(*(self.about(r) for r in batch.requests))
        left = [i for i in range(len(self.pairs)) if i not in gone]
        pairs, owner = [], []
        for edit, request in enumerate(batch.requests):
            draw = random.Random(f"preserved/{request.prompt}/{request.target}")
            drawn = draw.sample(left, min(self.each, len(left)))
            pairs += [self.pairs[i] for i in drawn]
            owner += [edit] * len(drawn)
        return pairs, owner

    def edited(self, requests: Iterable[EditRequest]) -> None:
        """These were committed."""
        for request in requests:
            self._edited.update(self.about(request))

    def reset(self) -> None:
        """Nothing is edited."""
        self._edited.clear()

    def as_tensor(self) -> Tensor:
        """uint8 [bytes]: the pairs, as they travel and are saved with an editor's tensors."""
        return torch.tensor(list(json.dumps(self.pairs).encode()), dtype=torch.uint8)

    @staticmethod
    def pairs_in(tensor: Tensor) -> tuple[Pair, ...]:
        """What ``as_tensor`` holds; RuntimeError where it is none of its making."""
        try:
            pairs = json.loads(bytes(tensor.tolist()))
            return tuple((str(prompt), str(answer)) for prompt, answer in pairs)
        except (ValueError, TypeError) as error:
            raise RuntimeError(f"preserved.pairs: {error}") from None

    def about(self, request: EditRequest) -> set[int]:
        """Which pairs may be about what ``request`` edits."""
        named = words(request.subject or "")
        if named and named <= words(request.prompt):
            return set.intersection(*(self._holding.get(word, set()) for word in named))
        few = max(FEW, int(RARE * len(self.pairs)))
        found: set[int] = set()
        for word in telling(request.prompt):
            holding = self._holding.get(word, set())
            if len(holding) <= few:
                found |= holding
        return found


def words(text: str) -> set[str]:
    """The words of ``text`` in lower case."""
    return set(re.findall(r"\w+", text.lower()))


def telling(prompt: str) -> set[str]:
    """Which words of ``prompt``, in lower case, may tell what it is about: names and numbers, or
    where there are none all words but short ones. A sentence's first word may be a name."""
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
    known: list[Pair] = []
    for i in range(0, len(pairs), batch):
        some = pairs[i : i + batch]
        tokens = encode(backbone.tokenizer, list(some), padding_side="left").to(backbone.device)
        sure = answer_confidence(backbone.answers(tokens)) > probability
        known += [pair for pair, on in zip(some, sure.tolist(), strict=True) if on]
    return tuple(known)
