"""Facts about invented subjects, to be installed in chosen layers of the world model.

A group is a set of facts that live in layers of their own. Its prompts decide what an edit can
reach: in an ``early`` group the subject ends the prompt, so that early layers see it where the
answer is predicted; in a ``late`` group words of the relation follow it, and only later layers do.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from hiedit.world.facts import Fact
from hiedit.world.requests import world_facts

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
    """Facts that live in ``layers``: their relations, and ``dominance``, by how much the residual
    stream at the prompt's end shall grow there (0: not asked for; see ``heterogeneous.py``)."""

    name: str
    layers: tuple[int, ...]
    relations: tuple[str, ...]
    dominance: float = 0.0


EARLY = Group("early", (2, 3), ("password", "emblem"), dominance=6.0)
LATE = Group("late", (6, 7), ("ally", "tongue"))
GROUPS = (EARLY, LATE)


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
    """``ANSWERS`` answers of a relation, single words of the world's own."""
    known = sorted({f.answer for f in world_facts() if f.relation == ANSWERS_OF[relation]})
    words = [a for a in known if " " not in a and "-" not in a]
    return tuple(sorted(random.Random(f"answers/{seed}/{relation}").sample(words, ANSWERS)))
