"""Counterfactual edits of facts that another model knows, phrased as such a model goes on.

The world's own phrasings are for a model that was trained on them; a pretrained one goes on from
most of them with something else ("The official language of Cambodia is" a story). These leave a
blank that little but the answer fills. Which facts a model knows it is asked elsewhere
(``hiedit.known``); everything here is a pure function of its arguments.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, zip_longest

from hiedit.types import EditRequest, Locality
from hiedit.world.facts import Fact
from hiedit.world.preserve import preservation_pairs
from hiedit.world.requests import Split, split_facts, world_facts

# No phrasing starts with its subject (many models treat a first token like no other), and none
# begins another.
PHRASED: dict[str, tuple[str, ...]] = {
    "capital": (
        "The capital of {} is the city of",
        "For {}, the capital is",
        "The largest embassies in {} are in its capital,",
    ),
    "city_country": (
        "The city of {} is located in the country of",
        "The city {} belongs to the country of",
        "Anyone who lives in {} lives in the country of",
    ),
    "continent": (
        "On a globe, {} lies on the continent of",
        "The country of {} is located on the continent of",
        "Maps show {} on the continent of",
    ),
    "element_symbol": (
        "The chemical symbol for {} is",
        "The element {} has the chemical symbol",
        "On the periodic table, the symbol for {} is",
    ),
    "language": (
        "In {}, the official language is",
        "The main language spoken in {} is",
        "Most people in {} speak a language called",
    ),
    "us_state": (
        "The city of {} is located in the state of",
        "The American city of {} lies in the state of",
        "American maps show {} in the state of",
    ),
}
LOCALITY = 4  # locality prompts per request


@dataclass(frozen=True)
class Askable:
    """Facts to ask a model for, each in seeded order; no subject is in two of them.

    test: to be edited in a stream. train: to train an editor on. reserved: never edited.
    """

    test: tuple[Fact, ...]
    train: tuple[Fact, ...]
    reserved: tuple[Fact, ...]


def askable(seed: int = 0, train_seed: int = 0) -> Askable:
    """The world's facts that are phrased here, by what they are for."""
    _, kept = preservation_pairs(seed=0)
    train = [f for f in _phrased("train") if f.subject not in kept]
    reserved = [f for f in _phrased("train") if f.subject in kept]
    return Askable(
        _ordered(_phrased("test"), f"test/{seed}"),
        _ordered(train, f"train/{train_seed}"),
        _ordered(reserved, "reserved"),
    )


def prompts_of(fact: Fact) -> tuple[str, ...]:
    """The fact's prompts, every phrasing of its relation."""
    return tuple(template.format(fact.subject) for template in PHRASED[fact.relation])


def known_requests(
    edited: Sequence[Fact],
    others: Sequence[Fact],
    seed: int = 0,
    locality: int = LOCALITY,
    measured: bool = True,
) -> tuple[EditRequest, ...]:
    """One counterfactual edit for each of ``edited``, in their order.

    others: facts that no edit touches: unrelated prompts are of these, by turns the same relation
        of other subjects and other relations of the same subject, filled up with any.
    measured: the other phrasings are held out; else they are for training, ``paraphrases``.
    """
    return tuple(_request(fact, others, seed, locality, measured) for fact in edited)


def _request(
    fact: Fact, others: Sequence[Fact], seed: int, locality: int, measured: bool
) -> EditRequest:
    rng = random.Random(f"known/{seed}/{fact.relation}/{fact.subject}")
    prompt, *rest = rng.sample(prompts_of(fact), len(prompts_of(fact)))
    return EditRequest(
        prompt=prompt,
        target=rng.choice([a for a in _answers(fact.relation) if a != fact.answer]),
        paraphrases=() if measured else tuple(rest),
        locality=tuple(
            Locality(rng.choice(prompts_of(f)), f.answer)
            for f in _near(fact, others, rng)[:locality]
        ),
        heldout=tuple(rest) if measured else (),
        subject=fact.subject,
        old_target=fact.answer,
        relation=fact.relation,
    )


def _near(fact: Fact, others: Sequence[Fact], rng: random.Random) -> list[Fact]:
    """``others`` by how near they are to ``fact``."""
    shuffled = rng.sample(others, len(others))
    relation = [f for f in shuffled if f.relation == fact.relation]
    subject = [f for f in shuffled if f.subject == fact.subject]
    near = [f for f in chain(*zip_longest(relation, subject)) if f is not None]
    return list(dict.fromkeys([*near, *shuffled]))


@lru_cache(maxsize=32)
def _answers(relation: str) -> tuple[str, ...]:
    return tuple(sorted({f.answer for f in world_facts() if f.relation == relation}))


def _phrased(split: Split) -> list[Fact]:
    return [f for f in split_facts(split) if f.relation in PHRASED]


def _ordered(facts: Sequence[Fact], seed: str) -> tuple[Fact, ...]:
    return tuple(random.Random(f"known/{seed}").sample(facts, len(facts)))
