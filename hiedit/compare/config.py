"""The subject of an experiment, as typed configuration (configs/experiment/)."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hiedit.backbone.modules import expand_ranges
from hiedit.catalogue import load_method
from hiedit.checks import at_least, choice
from hiedit.config import MethodConfig, TrainConfig, from_mapping
from hiedit.provenance import leaves
from hiedit.runconfig import ModelConfig

WORLDS = ("world", "heterogeneous")
NO_EDIT = "no-edit"
MOST_SUBSETS = 1000  # each is a stream


@dataclass(frozen=True)
class HeterogeneousConfig:
    """The world whose facts live in known layers: ``subjects`` a group, installed in ``steps``."""

    subjects: int = 150
    steps: int = 700
    seed: int = 0

    def __post_init__(self):
        at_least("experiment.heterogeneous.subjects", self.subjects, 5)
        at_least("experiment.heterogeneous.steps", self.steps, 0)


@dataclass(frozen=True)
class TuningConfig:
    """Every combination of ``grid`` (method key: its values) is measured on validation edits of
    training subjects, with ``seeds`` of their own; the best avg(ES, GS, LS) at a horizon wins.

    keys that a method does not use (``objective.rho`` of a training-free one) are left out for it;
    methods: by label, a grid of its own in place of ``grid``. per_horizon: false takes one setting
    for all horizons, the best mean over them, which one stream then measures. Instead of a list of
    values, ``{subsets: K, of: PATTERNS}`` gives all sets of K of those modules (``{4-7}`` is a
    range).
    """

    seeds: list[int] = field(default_factory=lambda: [100])
    grid: dict = field(default_factory=dict)
    methods: dict = field(default_factory=dict)
    per_horizon: bool = True


@dataclass(frozen=True)
class ProbesConfig:
    """Probes of where the editing matters: ``edits`` test edits a world (0: none), ``samples`` of
    noise each, with ``noise`` times the standard deviation of the embeddings. policies: labels of
    learned methods whose choices are correlated with them."""

    edits: int = 0
    samples: int = 5
    noise: float = 3.0
    policies: list[str] = field(default_factory=list)

    def __post_init__(self):
        at_least("experiment.probes.edits", self.edits, 0)
        at_least("experiment.probes.samples", self.samples, 1)
        at_least("experiment.probes.noise", self.noise, 0, strict=True)


@dataclass(frozen=True)
class OracleConfig:
    """Does it matter for an edit where its fact lives? In the heterogeneous world, ``edits`` test
    facts of each group alone (0: none) are edited in each group's modules, in those of all groups
    and in all editable ones, by the training-free ``method`` with each of ``etas``."""

    edits: int = 0
    method: str = "static"
    etas: list[float] = field(default_factory=lambda: [0.15])
    seeds: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self):
        at_least("experiment.oracle.edits", self.edits, 0)
        if not self.etas or not self.seeds:
            raise ValueError("experiment.oracle: etas and seeds need at least one value each")
        if load_method(self.method).trains:
            raise ValueError(f"experiment.oracle.method={self.method!r}: it must be training-free")


@dataclass(frozen=True)
class ExperimentConfig:
    """methods: labels, in the order of the tables: names of configs/method, or of ``catalogue``
    (label: {method: NAME, overrides: {KEY: VALUE}, horizons: [N]}, the last where it is measured at
    some of ``horizons`` only).

    learned: the label that the claims are about. baselines: what it is tested against.
    retention_share, batch: as in ``evaluate``.
    """

    name: str = "selection"
    worlds: list[str] = field(default_factory=lambda: ["world"])
    horizons: list[int] = field(default_factory=lambda: [200, 500, 1000])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    methods: list[str] = field(default_factory=lambda: [NO_EDIT, "random", "static", "hiedit"])
    catalogue: dict = field(default_factory=dict)
    learned: str = "hiedit"
    baselines: list[str] = field(default_factory=lambda: ["random"])
    model: ModelConfig = field(default_factory=ModelConfig)
    heterogeneous: HeterogeneousConfig = field(default_factory=HeterogeneousConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    probes: ProbesConfig = field(default_factory=ProbesConfig)
    oracle: OracleConfig = field(default_factory=OracleConfig)
    retention_share: float = 0.25
    batch: int = 128

    def __post_init__(self):
        for world in self.worlds:
            choice("experiment.worlds", world, WORLDS)
        for key in ("worlds", "horizons", "seeds", "methods"):
            values = getattr(self, key)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"experiment.{key}={values!r}: give one or more, each once")
        if min(self.horizons) < 1 or min(self.seeds) < 0:
            raise ValueError("experiment.horizons must be >= 1, experiment.seeds >= 0")
        if set(self.tuning.seeds) & set(self.seeds):
            raise ValueError(
                f"experiment.tuning.seeds={self.tuning.seeds!r}: those of the measurement are "
                f"{self.seeds!r}; tune with others"
            )
        if not self.tuning.seeds:
            raise ValueError("experiment.tuning.seeds=[]: give at least one")
        for label in self.methods:
            self.composition(label)
            for setting in self.settings(label):
                apply(self.composition(label), setting, f"experiment.methods={label}")

    def composition(self, label: str) -> MethodConfig:
        """The method behind ``label``, untuned; it carries the label as its name.

        Raises:
            ValueError: naming the label and the nearest that exists.
        """
        entry = self.catalogue.get(label, {"method": label})
        where = f"experiment.catalogue.{label}"
        keys = {"method", "overrides", "horizons"}
        unknown = set(entry) - keys if isinstance(entry, Mapping) else {entry}
        if unknown or "method" not in entry:
            raise ValueError(
                f"{where}={entry!r}: it must hold 'method' and, if need be, overrides and horizons"
            )
        lengths = entry.get("horizons", self.horizons)
        if not isinstance(lengths, list) or not all(type(n) is int and n > 0 for n in lengths):
            raise ValueError(f"{where}.horizons={lengths!r}: give a list of stream lengths")
        try:
            method = load_method(entry["method"])
        except ValueError as error:
            if label in self.catalogue:
                raise ValueError(f"{where}: {error}") from None
            near = difflib.get_close_matches(label, self.catalogue, n=1)
            hint = f" (or of experiment.catalogue: did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"experiment.methods: {error}{hint}") from None
        method = apply(method, entry.get("overrides") or {}, where)
        return dataclasses.replace(method, name=label)

    def horizons_of(self, label: str) -> tuple[int, ...]:
        """The stream lengths at which ``label`` is tuned and measured, ascending."""
        own = self.catalogue.get(label, {}).get("horizons", self.horizons)
        return tuple(sorted(set(own) & set(self.horizons)))

    def settings(self, label: str) -> list[dict[str, Any]]:
        """All combinations of the grid's values that this method's tuning tries."""
        method, tuning = self.composition(label), self.tuning
        grid = tuning.methods.get(label, tuning.grid)
        found: list[dict[str, Any]] = [{}]
        for key, values in grid.items():
            if label in tuning.methods or _uses(method, key):
                values = _values(values, f"experiment.tuning: {label}.{key}")
                found = [setting | {key: value} for setting in found for value in values]
        return found


def _values(given: Any, where: str) -> list[Any]:
    """The values of one key of a grid.

    Raises:
        ValueError: if subsets are asked for that do not exist, or too many.
    """
    if not isinstance(given, Mapping):
        return given if isinstance(given, list) else [given]
    size, patterns = given.get("subsets"), given.get("of")
    patterns = patterns if isinstance(patterns, list) else [patterns]
    named = (name for p in patterns if isinstance(p, str) for name in expand_ranges(p))
    names = list(dict.fromkeys(named))
    sound = set(given) == {"subsets", "of"} and type(size) is int and 1 <= size <= len(names)
    if not sound or math.comb(len(names), size) > MOST_SUBSETS:
        raise ValueError(
            f"{where}={dict(given)!r}: give values, or {{subsets: K, of: [PATTERN]}} with K of at "
            f"least 1, at most the {len(names)} modules named, and {MOST_SUBSETS} subsets or fewer"
        )
    return [list(subset) for subset in itertools.combinations(names, size)]


def apply(method: MethodConfig, overrides: Mapping[str, Any], where: str) -> MethodConfig:
    """``method`` with ``overrides`` (``updater.eta: 0.2``, or nested).

    Raises:
        ValueError: on an unknown key or a wrong type, naming it.
    """
    values = dataclasses.asdict(method)
    for key, value in leaves(overrides).items():
        place, parts = values, key.split(".")
        for part in parts[:-1]:
            place = place.get(part) if isinstance(place, dict) else None
        if not isinstance(place, dict) or parts[-1] not in place:
            near = difflib.get_close_matches(key, leaves(dataclasses.asdict(method)), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: {key}={value!r}: no such key of a method{hint}")
        place[parts[-1]] = value
    return from_mapping(MethodConfig, values, where)


def _uses(method: MethodConfig, key: str) -> bool:
    """Tell whether ``key`` can change anything: a method without updates has nothing to tune, one
    without training no objective, one without a policy nothing of it."""
    if method.updater.kind == "none":
        return False
    part = key.split(".")[0]
    return part != "objective" or method.trains


@dataclass(frozen=True)
class CompareConfig:
    """The root: which experiment, where its files go.

    run_dir: cells, editors, tables; given again, it is gone on with. report: only the tables and
    plots, from the cells that are there. jobs: processes (0: one per core). dry_run: only say
    what would be run.
    """

    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
    run_dir: str = "runs/selection"
    jobs: int = 0
    report: bool = False
    dry_run: bool = False

    def __post_init__(self):
        at_least("jobs", self.jobs, 0)
        if not self.run_dir:
            raise ValueError(f"run_dir={self.run_dir!r}: give the directory for the results")
