"""Counterfactual edits on the facts that the world model knows.

Subjects fall into two disjoint splits, "train" (for training an editor) and "test" (for measuring
one), with all their relations; a request's locality prompts come from its own split. Everything
here is a pure function of its arguments, and needs only the packaged ``facts.json``.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence, Set
from functools import lru_cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import Literal

from hiedit.types import EditRequest, Locality
from hiedit.world.corpus import heldout_prompt, seen_prompts
from hiedit.world.facts import Fact, load_facts

Split = Literal["train", "test"]
SPLITS = ("train", "test")
TRAIN_SHARE = 0.55
LOCALITY = 4  # locality prompts per request


def world_dir() -> Path:
    """The packaged world model: a directory for ``AutoModelForCausalLM.from_pretrained``."""
    return Path(__file__).parent / "assets"


@lru_cache(maxsize=1)
def world_facts() -> tuple[Fact, ...]:
    """All facts that the packaged model was trained on, sorted."""
    return tuple(load_facts(world_dir() / "facts.json"))


@lru_cache(maxsize=8)
def split_facts(split: Split, split_seed: int = 0) -> tuple[Fact, ...]:
    """The facts of one split, sorted.

    Subjects are divided 55 to 45 within each group that has the same relations, so that both
    splits hold every relation in like proportion.

    Raises:
        ValueError: if there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: it must be one of {', '.join(SPLITS)}")
    relations: dict[str, list[str]] = {}
    for fact in world_facts():
        relations.setdefault(fact.subject, []).append(fact.relation)
    groups: dict[tuple[str, ...], list[str]] = {}
    for subject in sorted(relations):
        groups.setdefault(tuple(relations[subject]), []).append(subject)
    # Groups one after another, every one shuffled: a running 55:45 is then kept in each.
    order = []
    for key in sorted(groups, key=lambda key: (-len(groups[key]), key)):
        order += random.Random(f"{split_seed}/{key}").sample(groups[key], len(groups[key]))
    train = {s for i, s in enumerate(order) if int((i + 1) * TRAIN_SHARE) > int(i * TRAIN_SHARE)}
    return tuple(f for f in world_facts() if (f.subject in train) == (split == "train"))


def world_requests(
    split: Split, seed: int = 0, locality: int = LOCALITY, split_seed: int = 0
) -> list[EditRequest]:
    """One counterfactual edit for every fact of the split, in seeded order.

    Locality prompts leave out the edited fact only; where several requests are applied one after
    another, take ``world_stream``, whose locality prompts leave out every edited fact.

    Args:
        seed: of order, phrasing, target and locality prompts. The split does not depend on it, so
            that no seed tests on what another trained on.
        locality: locality prompts per request.
        split_seed: of the split itself.

    Raises:
        ValueError: if there is no such split.
    """
    facts = split_facts(split, split_seed)
    order = random.Random(f"order/{seed}").sample(facts, len(facts))
    return [request_of(fact, facts, {fact}, seed, locality) for fact in order]


def world_stream(
    split: Split,
    n: int,
    seed: int = 0,
    exclude_edited: bool = True,
    locality: int = LOCALITY,
    split_seed: int = 0,
) -> list[EditRequest]:
    """A stream of ``n`` edits of distinct facts.

    Args:
        exclude_edited: take locality prompts only from facts that the stream does not edit, so
            that each keeps its gold answer to the end.

    Raises:
        ValueError: if there is no such split, or it has fewer than ``n`` facts.
    """
    facts = split_facts(split, split_seed)
    if not 0 <= n <= len(facts):
        raise ValueError(
            f"n is {n}: the {split} split of the world has {len(facts)} facts, "
            f"so a stream has 0 to {len(facts)} edits"
        )
    stream = random.Random(f"order/{seed}").sample(facts, len(facts))[:n]
    edited = set(stream)
    return [
        request_of(fact, facts, edited if exclude_edited else {fact}, seed, locality)
        for fact in stream
    ]


def preservation_prompts(
    n: int, seed: int = 0, exclude: Iterable[EditRequest] = (), split_seed: int = 0
) -> list[str]:
    """``n`` full sentences ("The capital of France is Paris") of facts of the train split.

    They stand for knowledge that edits should keep. Facts are distinct as long as there are
    enough, then come again in another phrasing.

    Args:
        exclude: requests whose facts are left out (those of the stream, when it is a train one).

    Raises:
        ValueError: if there are fewer than ``n`` sentences.
    """
    edited = {(request.relation, request.subject) for request in exclude}
    facts = [f for f in split_facts("train", split_seed) if (f.relation, f.subject) not in edited]
    rng = random.Random(f"preserve/{seed}")
    rounds: list[list[str]] = []
    for fact in rng.sample(facts, len(facts)):
        prompts = seen_prompts(fact)
        rounds.append([f"{p} {fact.answer}" for p in rng.sample(prompts, len(prompts))])
    found = [text for text in chain(*zip_longest(*rounds)) if text is not None]
    if n > len(found):
        raise ValueError(f"n is {n}: the world has {len(found)} sentences to preserve")
    return found[:n]


def request_of(
    fact: Fact,
    facts: tuple[Fact, ...],
    edited: Set[Fact],
    seed: int | str,
    locality: int,
    answers: Sequence[str] | None = None,
    avoid: Sequence[str] = (),
) -> EditRequest:
    """The counterfactual edit of ``fact``; locality prompts from those of ``facts`` that are not
    ``edited``. answers: what the target is drawn from (None: all answers of the relation in the
    world); avoid: answers that it must not be besides the fact's own."""
    rng = random.Random(f"request/{seed}/{fact.relation}/{fact.subject}")
    prompt, *paraphrases = rng.sample(seen_prompts(fact), len(seen_prompts(fact)))
    pool = _answers(fact.relation) if answers is None else answers
    return EditRequest(
        prompt=prompt,
        target=rng.choice([a for a in pool if a != fact.answer and a not in avoid]),
        paraphrases=tuple(paraphrases),
        locality=_locality(fact, facts, edited, rng, locality),
        heldout=(heldout_prompt(fact),),
        subject=fact.subject,
        old_target=fact.answer,
        relation=fact.relation,
    )


@lru_cache(maxsize=64)
def _answers(relation: str) -> tuple[str, ...]:
    """The distinct answers of a relation, sorted."""
    return tuple(sorted({f.answer for f in world_facts() if f.relation == relation}))


def _locality(
    fact: Fact, facts: tuple[Fact, ...], edited: Set[Fact], rng: random.Random, count: int
) -> tuple[Locality, ...]:
    """Hard neighbours by turns: the same relation of other subjects, other relations of the same
    subject; where there are too few of the one, more of the other. ``edited`` holds ``fact``."""
    relation = [f for f in facts if f.relation == fact.relation and f not in edited]
    subject = [f for f in facts if f.subject == fact.subject and f not in edited]
    pairs = zip_longest(
        rng.sample(relation, min(count, len(relation))),
        rng.sample(subject, min(count // 2, len(subject))),
    )
    chosen = [f for f in chain(*pairs) if f is not None][:count]
    return tuple(Locality(rng.choice(seen_prompts(f)), f.answer) for f in chosen)
