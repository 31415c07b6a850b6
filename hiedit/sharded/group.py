"""A sharded replica inside processes that somebody else started: a Ray actor, a test, a service.

address, port = meeting_place()            # in any one process, before the others begin
replica(Place(rank, world, address, port), model)      # in each of them, at the same time
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

from hiedit.runconfig import ModelConfig
from hiedit.sharded.loading import ShardedBackbone, load_sharded
from hiedit.sharded.ranks import RankLost, join, lost

__all__ = ["Place", "RankLost", "lost", "meeting_place", "replica"]


@dataclass(frozen=True)
class Place:
    """A process's place among ``world`` ranks: which it is, where they meet (loopback on one
    machine), and which of its node's devices it uses."""

    rank: int
    world: int
    address: str = "127.0.0.1"
    port: int = 29500
    local_rank: int = 0

    def __post_init__(self):
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank={self.rank}: it must be in [0, world={self.world})")


def meeting_place(address: str = "127.0.0.1") -> tuple[str, int]:
    """(address, a port that is free on this machine now)."""
    with socket.socket() as s:
        s.bind((address, 0))
        return address, s.getsockname()[1]


def replica(
    place: Place, model: ModelConfig, deepspeed: str = "zero3", timeout: float = 600.0
) -> ShardedBackbone:
    """This process's share of one model over ``place.world`` processes; each has to call it once.

    Raises:
        ValueError: as ``load_sharded``.
        RankLost: if one of the others does not come, or ends; within ``timeout`` seconds.
    """
    variables = {
        "RANK": place.rank,
        "WORLD_SIZE": place.world,
        "LOCAL_RANK": place.local_rank,
        "MASTER_ADDR": place.address,
        "MASTER_PORT": place.port,
    }
    return load_sharded(model, join(timeout, place.world, variables), deepspeed, show=False)
