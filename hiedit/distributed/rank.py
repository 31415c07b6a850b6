"""One rank of a worker whose replica is spread over several processes: a plain class, made remote
by the pool of groups. Every rank is asked the same and runs the same program; rank 0 answers as an
ordinary worker does, the others return nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hiedit.config import MethodConfig
from hiedit.distributed.learner import Setup, build_parts, contexts_in
from hiedit.distributed.transport import Packed, pack, unpack
from hiedit.distributed.worker import Report, RolloutWorker
from hiedit.evaluation.lifelong import StreamProbe
from hiedit.evaluation.results import MethodResult
from hiedit.experiment import Data, Hooks, run_method, training_requests
from hiedit.methods import build_method, editor_of, editor_tensors, record_choices
from hiedit.rl.environment import Environment
from hiedit.rl.learner import Gradients
from hiedit.rl.observed import load_learned_state
from hiedit.rl.rollout import Rollout
from hiedit.rl.segment import Trajectory
from hiedit.runconfig import RunConfig
from hiedit.sharded.group import Place, lost, meeting_place, replica
from hiedit.sharded.split import SplitObjective
from hiedit.types import EditRequest


@dataclass(frozen=True)
class Built:
    """A method before its training. names, groups: the editable modules, and the same by (I, O).
    parts: its ``editor_tensors``. requests: what it is trained on."""

    names: list[str]
    groups: Mapping[tuple[int, int], list[str]]
    parts: Packed
    requests: tuple[EditRequest, ...]


class RankWorker(RolloutWorker):
    """A share of one model. Calls come in this order: ``meet`` (rank 0), ``load``, then per method
    ``build`` (first group), ``begin`` and ``segment`` where it is trained, ``finish``, ``evaluate``
    (first group)."""

    def __init__(self, config: RunConfig, data: Data, rank: int):
        self.config, self.data, self.rank = config, data, rank
        self.backbone = self.probe = self.trajectory = None
        torch.set_num_threads(config.distribution.threads)

    def meet(self) -> tuple[str, int]:
        """(address, port) for the ranks of this group, on this one's node."""
        import ray

        return meeting_place(ray.util.get_node_ip_address())

    def load(self, where: tuple[str, int]) -> int:
        """This rank's shards; returns the process once all ranks have theirs."""
        d = self.config.distribution
        if not d.num_gpus:
            os.environ["DS_ACCELERATOR"] = "cpu"
        place = Place(self.rank, d.ranks_per_worker, *where)
        with lost():
            self.backbone = replica(place, self.config.model, d.deepspeed, d.timeout)
            self.backbone.ranks.barrier()
        return os.getpid()

    def build(self, method: MethodConfig) -> Built | None:
        """The method as it begins, measured on this group's replica."""
        self._unedited()
        c, data, backbone = self.config, self.data, self.backbone
        with lost():
            requests = training_requests(backbone, data, method, c.train, c.seed)
            made = build_method(backbone, method, requests, data.preserve, c.seed)
            made.rollout.reset()
        parts = pack(editor_tensors(made))
        return self._told(Built(backbone.names, backbone.shape_groups(), parts, requests))

    def begin(self, setup: Setup, parts: Packed, requests: tuple[EditRequest, ...]) -> None:
        """Stand at the beginning of a trajectory."""
        self._unedited()
        selector, updater = build_parts(setup, parts)
        selector, updater = selector.to(self.backbone.device), updater.to(self.backbone.device)
        env, passes = Environment(self.backbone), setup.method.passes
        rollout = Rollout(env, selector, updater, passes, contexts=contexts_in(parts))
        tokenizer, ranks = self.backbone.tokenizer, self.backbone.ranks
        objective = SplitObjective(setup.method.objective, tokenizer, ranks, setup.seed)
        self.setup, self.gradients = setup, Gradients(selector, updater)
        self.trajectory = Trajectory(rollout, objective, requests, setup.train, setup.seed)

    def segment(
        self, version: Packed, state: Packed | None = None
    ) -> tuple[Report | None, Packed | None, Packed | None]:
        """Do as an ordinary worker; all ranks begin with the same version and state."""
        with lost():
            report, contribution, end = super().segment(version, state)
        return self._told(report), self._told(contribution), self._told(end)

    def finish(
        self,
        method: MethodConfig,
        parts: Packed,
        version: Packed,
        requests: tuple[EditRequest, ...],
    ) -> Packed | None:
        """The trained editor (``editor_tensors``): ``parts`` with ``version``, and what its policy
        chooses noted."""
        self._unedited()
        made = editor_of(self.backbone, method, unpack(parts), self.config.seed)
        both = {"selector": made.rollout.selector, "updater": made.rollout.updater}
        load_learned_state(both, unpack(version, copy=False))
        with lost():
            record_choices(made, requests[: method.selector.effect_edits])
        return self._told(pack(editor_tensors(made)))

    def evaluate(self, method: MethodConfig, editor: Packed, board: Any) -> MethodResult | None:
        """Edit the stream with ``editor`` and measure; ``board`` (an actor) is told how far."""
        self._unedited()
        c, backbone = self.config, self.backbone

        def tell(done: int, total: int) -> None:
            if self.rank == 0:
                board.put.remote(done, total)

        with lost():
            if self.probe is None:
                self.probe = StreamProbe(backbone, self.data.stream, c.evaluate.batch)
            ready = editor_of(backbone, method, unpack(editor), c.seed)
            result, *_ = run_method(
                backbone, self.data, self.probe, method, c.train, c.measuring, c.seed,
                c.stream.n_edits, Hooks(edit=tell), ready,
            )  # fmt: skip
        return self._told(result)

    def _unedited(self) -> None:
        """Give up a trajectory, and with it what it wrote to the weights."""
        if self.trajectory is not None:
            self.trajectory.rollout.reset()
        self.trajectory = self.gradients = None

    def _told(self, answer: Any) -> Any:
        return answer if self.rank == 0 else None
