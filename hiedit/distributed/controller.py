"""Rollout workers, one learner, and who waits for whom.

    consumes                      waits for                      produces
    worker      version v, its own state     -            report, contribution, state at the end
    learner     contributions                -            version v + 1
    controller  reports                      see below    history, checkpoints, who begins what

    sync:   v -> every worker runs a segment -> all reports -> learner adds the contributions in
            the workers' order -> v + 1 -> ...
    async:  a report -> learner takes that contribution alone, unless it is older than
            ``max_staleness`` versions -> that worker begins again under the newest version

Tensors go from actor to actor through the object store; the controller sees references. A segment
is a function of the version and the state it begins with, and both stay in the store until it is
over: whoever loses its worker is redone by another, and comes out the same.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from hiedit.distributed.learner import Update
from hiedit.distributed.pool import Job, Ref, WorkerPool
from hiedit.distributed.transport import Packed, pack_snapshot, unpack_snapshot
from hiedit.distributed.worker import Report
from hiedit.parallel import WorkerDied
from hiedit.rl.checkpoint import LEARNER, Checkpoints, StopSignals, stopped, worker_name
from hiedit.rl.segment import TrainStep
from hiedit.runconfig import DistributionConfig

LOOK = 0.2  # seconds between two looks at the clock and at signals


@dataclass
class Counts:
    """Counts of what happened, for the display, the tracker and the tests.

    version: of the learner. dropped: losses and gradients that were not finite. stale: gradients
    too old to be used; staleness: of the last one. faults: segments that had to be redone. workers:
    alive. rate: edits per second since the version before.
    bytes_up, bytes_down, bytes_state: of all contributions, the last version, the last state.
    Seconds: compute, in segments (of each version the slowest); busy, of the mean worker in them;
    cpu, of all on their cores; packing, of the mean worker making arrays; learn, in the learner.
    """

    version: int = 0
    dropped: int = 0
    stale: int = 0
    staleness: int = 0
    faults: int = 0
    workers: int = 0
    rate: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    bytes_state: int = 0
    compute: float = 0.0
    busy: float = 0.0
    cpu: float = 0.0
    packing: float = 0.0
    learn: float = 0.0


class Controller:
    """Runs the workers of ``pool`` with ``learner`` (an actor) until their streams end."""

    def __init__(
        self,
        config: DistributionConfig,
        pool: WorkerPool,
        learner: Any,
        on_step: Callable[[TrainStep], None] = lambda step: None,
        checkpoints: Checkpoints | None = None,
        on_version: Callable[[list[TrainStep]], None] = lambda steps: None,
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ):
        self.config, self.pool, self.learner = config, pool, learner
        self.on_step, self.on_version = on_step, on_version
        self.checkpoints, self.say = checkpoints, say
        self.counts = Counts()
        self.history: list[TrainStep] = []
        self.states: list[Ref | None] = [None] * config.workers
        self._resumed = set()  # workers that begin from a state that they did not make themselves
        self._stop = StopSignals()

    def status(self) -> dict[str, float]:
        """Return what changes while it runs, for the display and the tracker."""
        keys = ("rate", "workers", "version", "staleness", "stale", "faults")
        return {key: getattr(self.counts, key) for key in keys}

    def load(self, parts: dict[str, Any], about: dict[str, Any]) -> None:
        """Go on from a checkpoint (the learner is given its part by whoever made it)."""
        self.history = [TrainStep(**step) for step in about["history"]]
        for i in range(self.config.workers):
            if worker_name(i) in parts:
                self.states[i] = ray.put(pack_snapshot(parts[worker_name(i)]))
                self._resumed.add(i)

    def run(self, max_seconds: float = 0.0) -> Packed:
        """Train to the end, or for ``max_seconds``; returns the last version.

        Raises:
            Interrupted: after SIGINT or SIGTERM, with a checkpoint where there are ``checkpoints``.
            WorkerDied: if a segment failed too often, or the learner died.
        """
        self._start = time.perf_counter() - (self.history[-1].seconds if self.history else 0.0)
        self._told = time.perf_counter() - self._start
        self._limit = max_seconds
        self.counts.workers = self.pool.alive()
        with self._stop:
            self._version = self.learner.publish.remote()
            self.counts.version = self._get(self._version).values["version"]
            (self._synchronous if self.config.mode == "sync" else self._asynchronous)()
            self._save()
            return self._get(self._version)

    def _synchronous(self) -> None:
        going = True
        while going and not self._late():
            begun = [self._begin(i) for i in range(self.config.workers)]
            done = sorted(self._finished(begun), key=lambda pair: pair[0].index)
            going = any(report.full for _, report in done)
            self.counts.compute += max(report.seconds for _, report in done)
            self._update([job for job, _ in done])
            self._keep(done)
            self._checkpoint_if_due()

    def _asynchronous(self) -> None:
        jobs = [self._begin(i) for i in range(self.config.workers)]
        waiting = self._finished(jobs)
        for job, report in waiting:
            self.counts.staleness = self.counts.version - job.version
            self.counts.compute += report.seconds / self.config.workers
            if self.counts.staleness > self.config.max_staleness:
                self.counts.stale += 1
            else:
                self._update([job])
            self._keep([(job, report)])
            self._checkpoint_if_due()
            if report.full and not self._late():
                jobs.append(self._begin(job.index))

    def _begin(self, index: int, attempt: int = 1, restore: bool = False) -> Job:
        restore = restore or index in self._resumed
        self._resumed.discard(index)
        state = self.states[index] if restore else None
        return self.pool.begin(index, self._version, self.counts.version, state, attempt)

    def _finished(self, jobs: list[Job]) -> Iterator[tuple[Job, Report]]:
        """Every job of ``jobs`` (which may grow meanwhile) with its report, as they end; what
        fails is redone."""
        while jobs:
            ready, _ = ray.wait([job.report for job in jobs], timeout=LOOK)
            self._stop_if_asked()
            self.counts.workers = self.pool.alive()
            for job in list(jobs):
                wrong, report = None, None
                if lost := self.pool.lost(job):
                    wrong = lost
                elif job.report in ready:
                    report, wrong = self._read(job)
                elif self.pool.spent(job) > self.config.timeout:
                    wrong = f"did not finish within distribution.timeout={self.config.timeout:g} s"
                if wrong:
                    jobs.remove(job)
                    jobs.append(self._redo(job, wrong))
                elif report is not None:
                    jobs.remove(job)
                    yield job, report

    def _read(self, job: Job) -> tuple[Report | None, str | None]:
        """(report, what is wrong with it)."""
        try:
            report = ray.get(job.report)
        except RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise error.cause from None  # the user's mistake, the same however often
            return None, f"failed ({type(error.cause).__name__}: {error.cause})"
        except RayActorError:
            return None, "died"
        if not report.finite:
            return None, "returned gradients that are not finite"
        return report, None

    def _redo(self, job: Job, wrong: str) -> Job:
        """The same segment in another process, unless that was tried often enough."""
        self.counts.faults += 1
        what = f"worker {job.index} {wrong}"
        if job.attempt > self.config.retries:
            path = self._save()
            where = f"; the checkpoint is {path}" if path else ""
            raise WorkerDied(
                f"{what}, after {job.attempt} attempts at this segment (distribution.retries="
                f"{self.config.retries}){where}"
            )
        self.say(f"{what}; its segment is redone by another (attempt {job.attempt + 1})")
        self.pool.replace(job.index)
        return self._begin(job.index, job.attempt + 1, restore=True)

    def _update(self, jobs: list[Job]) -> None:
        contributions = [job.contribution for job in jobs]
        update, self._version = self.learner.update.options(num_returns=2).remote(*contributions)
        told: Update = self._get(update)
        self.counts.version, self.counts.dropped = told.version, told.dropped
        self.counts.bytes_down = told.bytes
        self.counts.learn += told.seconds

    def _keep(self, done: list[tuple[Job, Report]]) -> None:
        """These segments are over: their edits count, and each worker's next one begins where its
        last one ended."""
        told = len(self.history)
        seconds = time.perf_counter() - self._start
        edits = sum(len(report.steps) for _, report in done)
        self.counts.rate = edits / max(seconds - self._told, 1e-9)
        self._told = seconds
        for job, report in done:
            self.states[job.index] = job.state
            self._count(report)
            before = report.before
            for step in report.steps:
                total = (self.history[-1].edit if self.history else 0) + step.edit - before
                before = step.edit
                self.history.append(dataclasses.replace(step, edit=total, seconds=seconds))
                self.on_step(self.history[-1])
        if edits:
            self.on_version(self.history[told:])

    def _count(self, report: Report) -> None:
        counts, workers = self.counts, self.config.workers
        counts.bytes_up += report.bytes
        counts.bytes_state = report.state
        counts.busy += report.seconds / workers
        counts.packing += report.packing / workers
        counts.cpu += report.cpu

    def _late(self) -> bool:
        return bool(self._limit) and time.perf_counter() - self._start > self._limit

    def _checkpoint_if_due(self) -> None:
        if self.checkpoints is not None and self.checkpoints.due(self.counts.version):
            self._save()

    def _stop_if_asked(self) -> None:
        """Segments that are running are given up: their beginnings are what is saved."""
        if self._stop.number is not None:
            raise stopped(self._stop.number, self._save())

    def _save(self) -> Path | None:
        """Write the newest version and every worker's state at the end of its last segment."""
        if self.checkpoints is None:
            return None
        parts = {LEARNER: unpack_snapshot(self._get(self.learner.state.remote()))}
        for i, state in enumerate(self.states):
            if state is not None:
                parts[worker_name(i)] = unpack_snapshot(self._get(state))
        steps = [dataclasses.asdict(step) for step in self.history]
        edits = self.history[-1].edit if self.history else 0
        return self.checkpoints.save(edits, parts, {"history": steps})

    def _get(self, ref: Ref) -> Any:
        try:
            return ray.get(ref)
        except RayActorError as error:
            raise WorkerDied(
                "the learner died; continue from the last checkpoint "
                f"(hiedit train resume=RUN_DIR). {' '.join(str(error).split())[:300]}"
            ) from None
