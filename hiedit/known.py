"""`dataset=known`: facts of the packaged collection that the model at hand knows, as records.

    model + collection -> it is asked -> RUN_DIR/known/{train,stream,preserve}.json -> load_data

The model is asked once, in the process that starts the run. Everybody else reads the files, which
are records like any others.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hiedit.backbone.model import Backbone
from hiedit.data.stream import StreamConfig
from hiedit.evaluation.metrics import answered
from hiedit.experiment import KNOWN, PRESERVE, load_backbone
from hiedit.progress import Progress, Update
from hiedit.runconfig import RunConfig
from hiedit.types import EditRequest
from hiedit.world import Fact
from hiedit.world.known import askable, known_requests, prompts_of
from hiedit.world.preserve import preservation_pairs

BATCH = 32  # facts that are asked at a time
BESIDE = 40  # facts that are known and not edited, from which the unrelated prompts come
LEAST_BESIDE = 20  # the same where the model knows few
MOST = 128  # training edits at most; a longer training draws them again
EFFECTS = 16  # training edits at least: what single-module effects are measured on

Tell = Callable[[int, int], None]  # known facts found, of how many wanted


@dataclass(frozen=True)
class KnownData:
    """train: requests to train an editor on. stream: to edit. preserve: (prompt, answer) pairs of
    subjects that neither edits. asked: facts that the model was asked for."""

    train: tuple[EditRequest, ...]
    stream: tuple[EditRequest, ...]
    preserve: tuple[tuple[str, str], ...]
    asked: int


def knows(backbone: Backbone, facts: Sequence[Fact]) -> list[Fact]:
    """Those of ``facts`` that the model gives in every phrasing: its greedy continuation begins
    with the answer, at a word boundary."""
    left, position = list(facts), 0
    while left and position < max(len(prompts_of(f)) for f in left):
        pairs = [(prompts_of(f)[position], f.answer) for f in left]
        right = answered(backbone, pairs).begins.tolist()
        left, position = [f for f, yes in zip(left, right, strict=True) if yes], position + 1
    return left


def first_known(
    backbone: Backbone, facts: Sequence[Fact], wanted: int, tell: Tell = lambda done, total: None
) -> tuple[list[Fact], int]:
    """(the first ``wanted`` of ``facts`` that the model knows, or all it knows; how many of
    ``facts`` it was asked for)."""
    found: list[Fact] = []
    asked = 0
    tell(0, wanted)
    for start in range(0, len(facts), BATCH):
        if len(found) >= wanted:
            break
        some = facts[start : start + BATCH]
        asked += len(some)
        found += knows(backbone, some)
        tell(min(len(found), wanted), wanted)
    return found[:wanted], asked


def known_data(
    backbone: Backbone,
    stream: StreamConfig,
    train: int,
    seed: int = 0,
    tell: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> KnownData:
    """A stream of ``stream.length`` counterfactual edits (None: as many as it can be) of facts that
    the model knows, about ``train`` more for training, of other subjects.

    Raises:
        ValueError: if the model knows too few facts.
    """
    facts = askable(stream.seed, seed)

    def ask(stage: str, some: Sequence[Fact], wanted: int) -> tuple[list[Fact], int]:
        return first_known(backbone, some, wanted, lambda done, total: tell(stage, done, total))

    length = len(facts.test) if stream.length is None else stream.length
    test, asked = ask("facts to edit", facts.test, length + BESIDE)
    able = len(test) - LEAST_BESIDE
    if stream.length is None:
        length = len(test) - BESIDE
    if not 0 < length <= able:
        raise ValueError(
            f"stream.length={stream.length}: of {asked} facts the model knows {len(test)}, enough "
            f"for {max(0, able)} edits beside {LEAST_BESIDE} facts that stay; give records of your "
            "own (dataset.path=FILE, --dataset FILE)"
        )
    kept, more = ask("facts to keep", facts.reserved, BESIDE)
    trained, last = ask("facts to train on", facts.train, max(train, EFFECTS))
    return KnownData(
        known_requests(trained, kept, seed, measured=False),
        known_requests(test[:length], test[length:], stream.seed),
        preservation_pairs(seed=0)[0],
        asked + more + last,
    )


def write(data: KnownData, directory: Path) -> Path:
    """Records as JSON, for ``dataset.path=DIRECTORY``."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, requests in (("train", data.train), ("stream", data.stream)):
        rows = [dataclasses.asdict(request) for request in requests]
        _write(directory / f"{name}.json", rows)
    _write(directory / PRESERVE, data.preserve)
    return directory


def _write(path: Path, rows: Sequence) -> None:
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def asked(config: RunConfig, trains: bool = True) -> RunConfig:
    """``config`` whose dataset are the records in its run's directory that the model was asked for,
    where it is ``known``; others as they are. trains: whether a method will train.

    Raises:
        ValueError: as ``known_data``.
    """
    if config.dataset.path != KNOWN:
        return config
    backbone = load_backbone(config.model)
    wanted = min(config.train.edits, MOST) if trains else 0
    with Progress() as progress:

        def show(stage: str, done: int, total: int) -> None:
            progress.show(Update(f"asking {config.model.name}", stage, done, total, unit="facts"))

        data = known_data(backbone, config.stream, wanted, config.seed, show)
    place = write(data, Path(config.run_dir) / "known")
    print(
        f"{config.model.name} was asked for {data.asked} facts, each in several phrasings; those "
        f"that it knows make a stream of {len(data.stream)} edits and {len(data.train)} for "
        f"training ({place})",
        flush=True,
    )
    dataset = dataclasses.replace(config.dataset, path=str(place), schema="hiedit")
    stream = dataclasses.replace(config.stream, length=len(data.stream))
    return dataclasses.replace(config, dataset=dataset, stream=stream)
