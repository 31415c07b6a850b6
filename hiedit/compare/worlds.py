"""The worlds of an experiment: model, training edits, streams, and where the facts truly live."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hiedit.backbone.model import Backbone
from hiedit.compare.cells import Setup
from hiedit.compare.config import HeterogeneousConfig
from hiedit.config import from_mapping
from hiedit.data.stream import standing
from hiedit.evaluation.lifelong import Measured, StreamProbe
from hiedit.experiment import load_backbone
from hiedit.provenance import digest
from hiedit.types import EditRequest
from hiedit.world.facts import Fact
from hiedit.world.heterogeneous import (
    InstalledWorld,
    build_heterogeneous,
    installed_requests,
    installed_stream,
    read_heterogeneous,
)
from hiedit.world.lifelong import lifelong_stream
from hiedit.world.preserve import preservation_pairs
from hiedit.world.requests import split_facts, world_requests

VALIDATION_SHARE = 0.5  # of the training subjects that are not reserved as knowledge to protect


@dataclass(frozen=True)
class World:
    """train: requests to train on. validation, test: facts that streams edit. preserve: knowledge
    to protect. truth: by relation, the modules that its facts were installed in (None: unknown).
    """

    backbone: Backbone
    train: tuple[EditRequest, ...]
    validation: tuple[Fact, ...]
    test: tuple[Fact, ...]
    preserve: tuple[tuple[str, str], ...]
    truth: Mapping[str, tuple[str, ...]] | None = None
    installed: InstalledWorld | None = None

    def stream(
        self, phase: str, n: int, seed: int, relations: Sequence[str] | None = None
    ) -> tuple[EditRequest, ...]:
        """``n`` edits: of validation facts while tuning, of test facts else; of ``relations``."""
        facts = self.validation if phase == "tune" else self.test
        if relations is not None:
            facts = tuple(f for f in facts if f.relation in relations)
        if self.installed is not None:
            return installed_stream(self.installed, facts, n, seed)
        return lifelong_stream(facts, n, seed)


def prepare(setup: Setup, run_dir: str | Path, say=lambda note: None) -> None:
    """Build what the world of ``setup`` needs and lacks, before any process wants it."""
    if setup.world == "heterogeneous":
        directory = installed_dir(setup.heterogeneous, run_dir)
        if not (directory / "heterogeneous.json").is_file():
            h = setup.heterogeneous
            say(f"building the heterogeneous world in {directory}")
            build_heterogeneous(directory, h.seed, h.subjects, h.steps)


def installed_dir(config: HeterogeneousConfig, run_dir: str | Path) -> Path:
    name = digest(json.dumps([config.subjects, config.steps, config.seed]))[:8]
    return Path(run_dir) / "worlds" / f"heterogeneous-{name}"


def load_world(setup: Setup, run_dir: str) -> World:
    """The world of ``setup``; training requests, validation and test facts share no subject."""
    return _loaded(json.dumps(dataclasses.asdict(setup)), run_dir)


@functools.lru_cache(maxsize=1)  # one model at a time and process; JSON because it can be hashed
def _loaded(text: str, run_dir: str) -> World:
    setup = from_mapping(Setup, json.loads(text))
    if setup.world == "heterogeneous":
        return _load_installed(setup, run_dir)
    preserve, reserved = preservation_pairs(seed=0)
    facts = [f for f in split_facts("train") if f.subject not in reserved]
    training, validation = halves(facts)
    subjects = {f.subject for f in training}
    train = tuple(r for r in world_requests("train") if r.subject in subjects)
    backbone = load_backbone(setup.model)
    return World(backbone, train, validation, split_facts("test"), preserve)


def _load_installed(setup: Setup, run_dir: str) -> World:
    installed = read_heterogeneous(installed_dir(setup.heterogeneous, run_dir))
    model = _replace_path(setup.model, installed.directory)
    training, validation = halves(installed.facts("train"))
    preserve, _ = preservation_pairs(seed=0)
    return World(
        load_backbone(model),
        installed_requests(installed, training),
        validation,
        installed.facts("test"),
        (*installed.preserve, *preserve),
        installed.truth,
        installed,
    )


def _replace_path(model, directory: Path):
    """The embedded model with facts installed: edited where that one is."""
    return dataclasses.replace(model, path=str(directory), tokens="answer", contexts=0)


def halves(facts) -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
    """(training, validation) facts without a common subject; the same whatever the seed of a run,
    so that what one tuned on no other trained on."""
    subjects = sorted({f.subject for f in facts})
    count = int(len(subjects) * (1 - VALIDATION_SHARE))
    first = set(random.Random("validation").sample(subjects, count))
    return (
        tuple(f for f in facts if f.subject in first),
        tuple(f for f in facts if f.subject not in first),
    )


class StandingProbe(StreamProbe):
    """Asks about the edits that still hold: not those that a later one contradicts."""

    def scored(self, upto: int) -> int:
        """Return how many of the first ``upto`` edits still hold and are asked about."""
        return sum(standing(self.requests[:upto]))

    def measure(self, upto: int) -> Measured:
        found = super().measure(upto)
        over = [i for i, holds in enumerate(standing(self.requests[:upto])) if not holds]
        if over:
            for values in vars(found).values():
                values[over] = float("nan")
        return found
