"""Rollout workers by index, each in its bundle of a placement group: made, used, replaced."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hiedit.distributed.worker import RolloutWorker
from hiedit.parallel import WorkerDied
from hiedit.runconfig import DistributionConfig

Ref = Any  # ray.ObjectRef: what it refers to is named where it is declared


@dataclass(frozen=True)
class Job:
    """A segment that a worker was given.

    report, contribution, state: references to what ``RolloutWorker.segment`` returns. version:
    the number it began with. begun: clock. attempt: 1 unless it is being redone. others: what the
    other ranks of the worker return, by rank, if it has any.
    """

    index: int
    report: Ref
    contribution: Ref
    state: Ref
    version: int
    begun: float
    attempt: int = 1
    others: Mapping[int, Ref] = field(default_factory=dict)


class WorkerPool:
    """``config.workers`` actors of ``actor``, by default ``RolloutWorker``.

    setups, parts, requests: references to the arguments of each worker and of all.
    """

    def __init__(
        self,
        config: DistributionConfig,
        setups: list[Ref],
        parts: Ref,
        requests: Ref,
        actor: type = RolloutWorker,
    ):
        self.config, self._arguments = config, (setups, parts, requests)
        self._remote = ray.remote(num_cpus=config.num_cpus, num_gpus=config.num_gpus)(actor)
        bundle = {"CPU": config.num_cpus} | ({"GPU": config.num_gpus} if config.num_gpus else {})
        self._group = placement_group([bundle] * config.workers, strategy=config.placement)
        self.handles: list[Any] = []
        self._loading: dict[int, Ref] = {}  # by index, what is there once the replica is
        self._loaded: dict[int, float] = {}  # by index, when that was noticed

    def start(self) -> None:
        """Load all replicas.

        Raises:
            WorkerDied: if the cluster has no room for them within ``config.load_timeout`` seconds.
        """
        if not self._group.wait(self.config.load_timeout):
            raise WorkerDied(
                f"Ray found no room for {self.config.workers} workers within "
                f"distribution.load_timeout={self.config.load_timeout:g} s: is the cluster busy?"
            )
        self.handles = [None] * self.config.workers
        for index in range(self.config.workers):
            self._load(index)
        ray.get(list(self._loading.values()))

    def begin(self, index: int, version: Ref, number: int, state: Ref, attempt: int = 1) -> Job:
        """Give worker ``index`` a segment under ``version``; ``state`` is where a replacement
        begins, None for the worker that ended its last segment there itself."""
        refs = self.handles[index].segment.options(num_returns=3).remote(version, state)
        return Job(index, *refs, number, time.monotonic(), attempt)

    def replace(self, index: int) -> None:
        """End worker ``index``, in whatever state it is, and begin to load another."""
        ray.kill(self.handles[index], no_restart=True)
        self._load(index)

    def lost(self, job: Job) -> str | None:
        """Return what went wrong in a rank of ``job`` other than the one that reports."""
        return None

    def alive(self) -> int:
        """Return how many have their replica loaded."""
        for index, ref in list(self._loading.items()):
            if ray.wait([ref], timeout=0)[0]:
                del self._loading[index]
                self._loaded[index] = time.monotonic()
        return len(self.handles) - len(self._loading)

    def spent(self, job: Job) -> float:
        """Seconds that the worker has had for ``job``, loading its replica not counted; while that
        goes on, 0 for as long as it may take, then infinity."""
        self.alive()
        if job.index in self._loading:
            late = time.monotonic() - job.begun > self.config.load_timeout
            return math.inf if late else 0.0
        return time.monotonic() - max(job.begun, self._loaded.get(job.index, 0.0))

    def stop(self) -> None:
        """End all workers and give their places back."""
        for handle in filter(None, self.handles):
            ray.kill(handle, no_restart=True)
        self.handles = []
        remove_placement_group(self._group)

    def _load(self, index: int) -> None:
        setups, parts, requests = self._arguments
        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        options = self._remote.options(scheduling_strategy=place)
        self.handles[index] = options.remote(setups[index], parts, requests)
        self._loading[index] = self.handles[index].ready.remote()
        self._loaded.pop(index, None)
