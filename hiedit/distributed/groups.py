"""Workers that are groups of ranks: the actors of each in a placement group of their own, loaded,
asked and replaced together."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hiedit.config import MethodConfig
from hiedit.distributed.board import Board
from hiedit.distributed.learner import Setup
from hiedit.distributed.pool import Job, Ref, WorkerPool
from hiedit.distributed.rank import Built, RankWorker
from hiedit.distributed.transport import Packed
from hiedit.evaluation.results import MethodResult
from hiedit.experiment import Data
from hiedit.parallel import WorkerDied
from hiedit.runconfig import RunConfig
from hiedit.sharded.group import RankLost

LOOK = 0.2  # seconds between two looks at ranks that are at work
CAUSE = 5.0  # seconds that a rank's death may take to be known after it was missed


class GroupPool(WorkerPool):
    """``workers`` groups of ``ranks_per_worker`` actors of ``actor``. ``handles[i]`` are the ranks
    of group ``i``; a rank that is lost costs its whole group, which is replaced."""

    def __init__(
        self,
        config: RunConfig,
        data: Data,
        actor: type = RankWorker,
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ):
        self.config = d = config.distribution
        self.say = say
        self._given = ray.put(config), ray.put(data)
        self._remote = ray.remote(num_cpus=d.num_cpus, num_gpus=d.num_gpus)(actor)
        bundle = {"CPU": d.num_cpus} | ({"GPU": d.num_gpus} if d.num_gpus else {})
        ranks = [bundle] * d.ranks_per_worker
        self._places = [placement_group(ranks, strategy=d.placement) for _ in range(d.workers)]
        self.handles: list[list[Any]] = []
        self._loading: dict[int, Ref] = {}
        self._loaded: dict[int, float] = {}
        self._loads: dict[int, list[Ref]] = {}  # by index, what every rank's loading returns
        self._trained: tuple[list[Setup], Ref, Ref] | None = None

    def start(self) -> None:
        """Begin to load all replicas.

        Raises:
            WorkerDied: if the cluster has no room for them within ``load_timeout`` seconds.
        """
        d, end = self.config, time.monotonic() + self.config.load_timeout
        for place in self._places:
            if not place.wait(max(0.0, end - time.monotonic())):
                raise WorkerDied(
                    f"Ray found no room for {d.workers} groups of {d.ranks_per_worker} ranks "
                    f"within distribution.load_timeout={d.load_timeout:g} s: is the cluster busy?"
                )
        self.handles = [[] for _ in self._places]
        for index in range(d.workers):
            self._load(index)

    def build(self, method: MethodConfig) -> Built:
        """``method`` as it begins, measured by the first group. Raises as ``evaluate``."""
        return self._asked(f"{method.name}: preparing", lambda rank: rank.build.remote(method))

    def train(self, setups: list[Setup], parts: Ref, requests: Ref) -> None:
        """Every group stands at the beginning of its trajectory, as will those that replace it."""
        self._trained = setups, parts, requests
        for index in range(len(self.handles)):
            self._begin(index)

    def finish(self, method: MethodConfig, parts: Ref, version: Ref, requests: Ref) -> Packed:
        """The tensors of the trained editor. Raises as ``evaluate``."""
        self._trained = None
        what = f"{method.name}: finishing"
        return self._asked(what, lambda r: r.finish.remote(method, parts, version, requests))

    def evaluate(
        self, method: MethodConfig, editor: Ref, tell: Callable[[int, int], None]
    ) -> MethodResult:
        """The first group edits the stream and measures; ``tell`` hears how far it is.

        Raises:
            ValueError: as one of the ranks.
            WorkerDied: if the group lost a rank more often than ``retries`` allows.
        """
        board = ray.remote(num_cpus=0)(Board).remote()
        said, told = board.read.remote(), (0, 0)

        def look() -> None:
            nonlocal said, told
            if ray.wait([said], timeout=0)[0]:
                found = ray.get(said)
                if found != told:
                    tell(*found)
                said, told = board.read.remote(), found

        what = f"{method.name}: editing the stream"
        try:
            return self._asked(what, lambda r: r.evaluate.remote(method, editor, board), look)
        finally:
            ray.kill(board)

    def begin(self, index: int, version: Ref, number: int, state: Ref, attempt: int = 1) -> Job:
        """Do as ``WorkerPool.begin``, on all ranks; rank 0 reports."""
        ranks = self.handles[index]
        refs = [rank.segment.options(num_returns=3).remote(version, state) for rank in ranks]
        others = {rank: given[0] for rank, given in enumerate(refs) if rank}
        return Job(index, *refs[0], number, time.monotonic(), attempt, others)

    def replace(self, index: int) -> None:
        """End all ranks of group ``index``, and begin to load another."""
        for rank in self.handles[index]:
            ray.kill(rank, no_restart=True)
        self._load(index)

    def lost(self, job: Job) -> str | None:
        return self._wrong(job.index, [job.report, *job.others.values()])

    def stop(self) -> None:
        """End all ranks and give their places back."""
        for rank in itertools.chain(*self.handles):
            ray.kill(rank, no_restart=True)
        self.handles = []
        for place in self._places:
            remove_placement_group(place)

    def _load(self, index: int) -> None:
        ranks = []
        for rank in range(self.config.ranks_per_worker):
            place = PlacementGroupSchedulingStrategy(
                self._places[index], placement_group_bundle_index=rank
            )
            ranks.append(self._remote.options(scheduling_strategy=place).remote(*self._given, rank))
        where = ranks[0].meet.remote()
        self._loads[index] = [rank.load.remote(where) for rank in ranks]
        self._loading[index] = self._loads[index][0]  # which waits for the others
        self._loaded.pop(index, None)
        self.handles[index] = ranks
        if self._trained is not None:
            self._begin(index)

    def _begin(self, index: int) -> None:
        setups, parts, requests = self._trained
        for rank in self.handles[index]:
            rank.begin.remote(setups[index], parts, requests)

    def _asked(
        self, what: str, ask: Callable[[Any], Ref], look: Callable[[], None] = lambda: None
    ) -> Any:
        """Return what rank 0 of the first group answers when all its ranks are asked; asked again
        of its replacement where one of them is lost."""
        for attempt in itertools.count(1):
            answers = [ask(rank) for rank in self.handles[0]]
            while not (wrong := self._wrong(0, answers)):
                if ray.wait(answers, num_returns=len(answers), timeout=LOOK)[1] == []:
                    wrong = self._wrong(0, answers)
                    break
                look()
            if not wrong:
                return ray.get(answers[0])
            if attempt > self.config.retries:
                raise WorkerDied(
                    f"{what}: worker 0 {wrong}, after {attempt} attempts "
                    f"(distribution.retries={self.config.retries})"
                )
            self.say(f"{what}: worker 0 {wrong}; another begins (attempt {attempt + 1})")
            self.replace(0)

    def _wrong(self, index: int, answers: Sequence[Ref]) -> str | None:
        """Return what is known to have gone wrong in a group's ranks, which have these answers to
        give; the cause rather than that the others miss a rank.

        Raises:
            ValueError: if one of them did: the user's mistake, the same however often.
        """
        refs = [*self._loads[index], *answers]
        known = _failures(refs, 0.0)
        if known and all(isinstance(error, RankLost) for error in known.values()):
            known = _failures(refs, CAUSE)
        for number, error in sorted(known.items(), key=lambda pair: isinstance(pair[1], RankLost)):
            doing = " while it loaded its replica" if number < len(self._loads[index]) else ""
            rank = number % len(self._loads[index])
            if isinstance(error, ValueError):
                raise error from None
            if isinstance(error, RayActorError):
                return f"lost rank {rank}, which died{doing}"
            return f"failed in rank {rank}{doing} ({type(error).__name__}: {error})"
        return None


def _failures(refs: Sequence[Ref], patience: float) -> dict[int, Exception]:
    """Return, by place, the errors among ``refs``; with ``patience``, once one of them is another
    than that a rank is missed, or after so many seconds."""
    end = time.monotonic() + patience
    while True:
        known = {}
        for number, ref in enumerate(refs):
            if not ray.wait([ref], timeout=0, fetch_local=False)[0]:
                continue
            try:
                ray.get(ref)
            except RayTaskError as error:
                known[number] = error.cause
            except RayActorError as error:
                known[number] = error
        cause = any(not isinstance(error, RankLost) for error in known.values())
        if cause or time.monotonic() >= end:
            return known
        time.sleep(LOOK)
