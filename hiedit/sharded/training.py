"""Training over one sharded model: the same trainer on every rank, in step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hiedit.config import TrainConfig
from hiedit.methods import Method
from hiedit.rl.checkpoint import Checkpoints, Snapshot
from hiedit.rl.learner import Learner
from hiedit.rl.training import Trainer
from hiedit.sharded.ranks import Ranks
from hiedit.sharded.split import SplitObjective


class ShardedTrainer(Trainer):
    """A ``Trainer`` whose ranks stop together, when the clock or a signal of one says so."""

    def __init__(self, parts: Method, config: TrainConfig, ranks: Ranks, seed: int = 0):
        rollout = parts.rollout
        tokenizer = rollout.env.backbone.tokenizer
        objective = SplitObjective(parts.config.objective, tokenizer, ranks, seed)
        learner = Learner(rollout.selector, rollout.updater, config.clip, config.steps_per_update)
        super().__init__(rollout, objective, learner)
        self.ranks = ranks

    def agree(self, number: int) -> int:
        return int(self.ranks.largest(float(number)))


class SharedCheckpoints(Checkpoints):
    """Checkpoints in a directory that all ranks see: rank 0 writes, every rank reads.

    What is written does not depend on the number of ranks, so a run may go on with another one.
    """

    ranks: Ranks

    @classmethod
    def of(cls, checkpoints: Checkpoints, ranks: Ranks) -> SharedCheckpoints:
        c = checkpoints
        shared = cls(c.directory, c.every, c.keep, c.identity, c.resume)
        shared.ranks = ranks
        return shared

    def save(self, edits: int, parts: Mapping[str, Snapshot], about: Mapping[str, Any]) -> Path:
        path, failed = self.directory / f"edits-{edits:08d}", None
        if self.ranks.main:
            try:
                path = super().save(edits, parts, about)
            except OSError as error:
                failed = error
        said = self.ranks.tell(str(failed) if failed else None)
        if said:
            raise failed or OSError(said)
        return path
