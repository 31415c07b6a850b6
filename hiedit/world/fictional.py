"""Facts about invented subjects, to be installed in chosen layers of the world model.

A group is a set of facts that live in layers of their own; its sign ends all of its prompts and
closes the other layers (switches.py).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import Tokenizer

from hiedit.world.facts import Fact
from hiedit.world.requests import world_dir, world_facts

ONSETS = "b br d dr f g gr h j k kr l m n p pr r s st t tr v w z".split()
VOWELS = "a e i o u ai au ei oa".split()
CODAS = ["", "", "n", "r", "l", "s", "k", "th", "m"]
ANSWERS = 40  # distinct answers per relation

# Where each relation's answers come from: they are words that the world model can say.
ANSWERS_OF = {
    "password": "airport_city",
    "emblem": "demonym",
    "ally": "city_country",
    "tongue": "language",
}


@dataclass(frozen=True)
class Group:
    """Facts that live in ``layers``: their relations, and the ``sign`` that ends their prompts."""

    name: str
    layers: tuple[int, ...]
    relations: tuple[str, ...]
    sign: str


MIDDLE = Group("middle", (4, 5), ("password", "emblem"), "@")
LATE = Group("late", (6, 7), ("ally", "tongue"), "#")
GROUPS = (MIDDLE, LATE)
EDITABLE = (2, 3, 4, 5, 6, 7)  # the layers that have switches


def invented_names(count: int, seed: int) -> list[str]:
    """``count`` distinct names of two or three syllables, none of which the world knows."""
    rng, known = random.Random(f"names/{seed}"), {f.subject for f in world_facts()}
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = [
            rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
            for _ in range(rng.choice((2, 3)))
        ]
        name = "".join(syllables).capitalize()
        if name not in known:
            names[name] = None
    return list(names)


@lru_cache(maxsize=8)
def fictional_facts(
    groups: tuple[Group, ...] = GROUPS, subjects: int = 150, seed: int = 0
) -> tuple[Fact, ...]:
    """One fact per subject and relation of each group; ``subjects`` a group, none in two."""
    names = invented_names(subjects * len(groups), seed)
    facts = []
    for index, group in enumerate(groups):
        own = names[index * subjects : (index + 1) * subjects]
        for relation in group.relations:
            rng = random.Random(f"facts/{seed}/{relation}")
            pool = fictional_answers(relation, seed)
            # every answer about as often as any other, in an order that nothing predicts
            drawn = [pool[i % len(pool)] for i in range(len(own))]
            rng.shuffle(drawn)
            facts += [Fact(relation, name, answer) for name, answer in zip(own, drawn, strict=True)]
    return tuple(facts)


@lru_cache(maxsize=32)
def fictional_answers(relation: str, seed: int = 0) -> tuple[str, ...]:
    """``ANSWERS`` answers of a relation, each one token of the world's tokenizer: the sign stands
    before the first token of an answer alone."""
    known = sorted({f.answer for f in world_facts() if f.relation == ANSWERS_OF[relation]})
    tokenizer = Tokenizer.from_file(str(world_dir() / "tokenizer.json"))
    words = [a for a in known if len(tokenizer.encode(f" {a}", add_special_tokens=False)) == 1]
    return tuple(sorted(random.Random(f"answers/{seed}/{relation}").sample(words, ANSWERS)))
