"""The order in which edits arrive, and which rows are for training and which for editing.

Every draw comes from `random.Random.random`, whose sequence Python promises to keep: the same seed
gives the same stream on every platform and version.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hiedit.types import EditBatch, EditRequest


@dataclass(frozen=True)
class StreamConfig:
    """An edit stream: ``length`` edits (None: all), ``n_edits`` of them per step.

    seed, shuffle: the order; not shuffled, it is that of the file. Streams of one seed are prefixes
    of each other. train_share: of the rows, where one file serves both training and editing.
    """

    length: int | None = None
    n_edits: int = 1
    seed: int = 0
    shuffle: bool = True
    train_share: float = 0.8

    def __post_init__(self):
        for key, low in (("length", 1), ("n_edits", 1), ("seed", 0)):
            value = getattr(self, key)
            if value is None and key == "length":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"stream.{key}={value!r}: it must be a whole number >= {low}")
        if not isinstance(self.shuffle, bool):
            raise ValueError(f"stream.shuffle={self.shuffle!r}: it must be true or false")
        if not isinstance(self.train_share, (int, float)) or not 0 < self.train_share < 1:
            raise ValueError(f"stream.train_share={self.train_share!r}: it must lie in (0, 1)")


def _shuffled(count: int, seed: int) -> list[int]:
    draw = random.Random(seed).random
    keys = [draw() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)


def _facts(request: EditRequest) -> Iterator[tuple[str, ...]]:
    """Return what ``request`` may share with another one of the same fact: its prompt; its subject
    with the relation, or where none is named with the answer that was true of it before."""
    yield "prompt", request.prompt
    subject = (request.subject or "").casefold()
    told = request.relation or (request.old_target or "").casefold()
    if subject and told:
        yield ("relation" if request.relation else "answer"), subject, told


def standing(requests: Sequence[EditRequest]) -> list[bool]:
    """Return which of ``requests`` still hold after the last one: the last edit of the same fact,
    however it is phrased, says the same answer."""
    last = {fact: request.target for request in requests for fact in _facts(request)}
    return [all(last[fact] == r.target for fact in _facts(r)) for r in requests]


class EditStream:
    """The edits in order of arrival, as batches; a sequence that can be walked any number of times.

    Each walk begins at ``start`` (0, or where a restored stream left off) and moves ``position``.

    Raises:
        ValueError: if it is to hold more edits than there are requests.
    """

    def __init__(self, requests: Sequence[EditRequest], config: StreamConfig | None = None):
        self.config = config = config or StreamConfig()
        rows = len(requests)
        length = rows if config.length is None else config.length
        if not rows:
            raise ValueError("an edit stream needs at least one request, there are 0")
        if length > rows:
            raise ValueError(f"stream.length={length}: there are only {rows} edit requests")
        if config.n_edits > length:
            raise ValueError(f"stream.n_edits={config.n_edits}: the stream has only {length} edits")
        order = _shuffled(rows, config.seed) if config.shuffle else range(rows)
        self.requests: tuple[EditRequest, ...] = tuple(requests[i] for i in order[:length])
        self.start = self.position = 0

    @property
    def edits(self) -> int:
        """Return how many edits the stream holds."""
        return len(self.requests)

    def __len__(self) -> int:
        """Return how many steps there are."""
        return -(-self.edits // self.config.n_edits)

    def __getitem__(self, step: int) -> EditBatch:
        """The batch of one step; the last may be short."""
        steps = len(self)
        if not -steps <= step < steps:
            raise IndexError(f"step {step}: the stream has {steps}")
        step %= steps
        size = self.config.n_edits
        return EditBatch(self.requests[step * size : (step + 1) * size], step * size)

    def __iter__(self) -> Iterator[EditBatch]:
        for step in range(self.start, len(self)):
            self.position = step + 1
            yield self[step]

    def state(self) -> dict[str, Any]:
        """Return where the latest walk is, as plain JSON. Taken inside a loop it counts the batch
        in hand as done."""
        return {
            "config": dataclasses.asdict(self.config),
            "position": self.position,
            "fingerprint": self._fingerprint(),
        }

    @classmethod
    def from_state(cls, requests: Sequence[EditRequest], state: Mapping[str, Any]) -> EditStream:
        """The stream over the same ``requests`` that goes on where `state` was taken.

        Raises:
            ValueError: if the state is none, or belongs to other requests.
        """
        try:
            stream = cls(requests, StreamConfig(**state["config"]))
            position, fingerprint = state["position"], state["fingerprint"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the state of an edit stream: {error!r}") from None
        if fingerprint != stream._fingerprint():
            raise ValueError(
                "the state belongs to a stream of other edit requests: resume with the same file, "
                "split and order"
            )
        if not isinstance(position, int) or not 0 <= position <= len(stream):
            raise ValueError(f"position {position!r}: the stream has {len(stream)} steps")
        stream.start = stream.position = position
        return stream

    def _fingerprint(self) -> str:
        rows = [[request.prompt, request.target] for request in self.requests]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def splits(
    requests: Sequence[EditRequest], fractions: Sequence[float], seed: int = 0
) -> tuple[tuple[EditRequest, ...], ...]:
    """Parts of about ``fractions`` of the requests, each in the order given, that share no subject
    (no prompt, where the subject is not known). What the fractions leave out is left out.

    Raises:
        ValueError: if the fractions are none, or too small for a part to hold anything.
    """
    fractions = tuple(fractions)
    if not fractions or min(fractions) <= 0 or sum(fractions) > 1 + 1e-9:
        raise ValueError(f"fractions={fractions}: each must be > 0, and their sum at most 1")
    groups: dict[str, list[int]] = {}
    subjects = {r.prompt: r.subject for r in requests if r.subject}
    for i, request in enumerate(requests):
        subject = request.subject or subjects.get(request.prompt)
        key = f"subject {subject.casefold()}" if subject else f"prompt {request.prompt}"
        groups.setdefault(key, []).append(i)
    members = list(groups.values())
    # each group goes to the part that lacks most, which keeps the sizes right and none empty; what
    # the fractions leave out is a last part, dropped
    lack = [fraction * len(requests) for fraction in (*fractions, 1 - sum(fractions))]
    chosen: list[list[int]] = [[] for _ in lack]
    for i in _shuffled(len(members), seed):
        part = max(range(len(lack)), key=lack.__getitem__)
        chosen[part] += members[i]
        lack[part] -= len(members[i])
    parts = [tuple(requests[i] for i in sorted(part)) for part in chosen[:-1]]
    empty = [fraction for fraction, part in zip(fractions, parts, strict=True) if not part]
    if empty:
        raise ValueError(
            f"fractions={fractions}: nothing is left for {empty[0]} of {len(requests)} requests "
            f"with {len(groups)} subjects"
        )
    return tuple(parts)


def train_and_edit(
    requests: Sequence[EditRequest], config: StreamConfig
) -> tuple[tuple[EditRequest, ...], tuple[EditRequest, ...]]:
    """One file for both: ``train_share`` of the requests to train an editor on, and the rest, of
    other subjects, to edit."""
    train, edit = splits(requests, (config.train_share, 1 - config.train_share), config.seed)
    return train, edit
