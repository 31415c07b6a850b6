"""Streams longer than the facts: facts are edited again, each time to another answer.

A stream of any length is the beginning of every longer one with the same seed, so that one run
measured on the way gives what runs of their own would. A fifth of the facts is never edited and
gives all locality prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from hiedit.types import EditRequest
from hiedit.world.facts import Fact
from hiedit.world.requests import LOCALITY, request_of

RESERVE = 0.2  # of the facts: never edited


def lifelong_stream(
    facts: Sequence[Fact],
    n: int,
    seed: int = 0,
    locality: int = LOCALITY,
    answers: Callable[[str], Sequence[str]] | None = None,
) -> tuple[EditRequest, ...]:
    """``n`` edits of ``facts``: all that may be edited once, then in a new order again, and so on.

    answers: by relation, what targets are drawn from (None: the world's own answers).

    Raises:
        ValueError: if there are fewer than two facts.
    """
    if len(facts) < 2:
        raise ValueError(f"a stream needs 2 facts or more, one of them to leave alone: {facts!r}")
    order = random.Random(f"lifelong/{seed}").sample(list(facts), len(facts))
    kept = max(1, round(RESERVE * len(order)))
    editable, pool = order[:-kept], tuple(sorted(facts))
    edited, said, requests = set(editable), {}, []
    while len(requests) < n:
        turn = len(requests) // len(editable)
        for fact in editable[: n - len(requests)]:
            request = request_of(
                fact,
                pool,
                edited,
                f"{seed}/{turn}" if turn else seed,
                locality,
                answers(fact.relation) if answers else None,
                said.get(fact, ()),
            )
            said[fact] = (request.target,)
            requests.append(request)
        editable = random.Random(f"lifelong/{seed}/{turn + 1}").sample(editable, len(editable))
    return tuple(requests)
