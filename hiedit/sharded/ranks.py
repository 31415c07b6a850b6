"""The ranks of one sharded model: who they are, and what they say to each other.

Whatever decides how a run goes on (a clock, a signal, a number that is not finite) has to be the
same on every rank, or one of them waits for a collective that the others never enter.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hiedit.sharded import require_deepspeed
from hiedit.sharded.building import check_builds, find_ninja

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RankLost(RuntimeError):
    """Another rank of the group ended or did not answer in time."""


@dataclass
class Traffic:
    """Bytes that this rank sent, by what for; ``gather`` is counted by ``counted`` in
    ``hiedit.sharded.traffic``."""

    sent: dict[str, int] = field(default_factory=dict)

    def add(self, what: str, count: int) -> None:
        self.sent[what] = self.sent.get(what, 0) + count


@dataclass(frozen=True)
class Ranks:
    """This process among the ``world`` that share one model. device: of its tensors in use."""

    rank: int
    world: int
    device: torch.device
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum_(self, t: Tensor, what: str = "reduce") -> Tensor:
        """The sum over ranks, in place; the same bits on every one of them."""
        return self._reduce(t, "SUM", what)

    def largest(self, value: float) -> float:
        """The largest of a number by rank; NaN counts as infinite."""
        value = float("inf") if value != value else value
        t = torch.tensor([value], dtype=torch.float64, device=self.device)
        return float(self._reduce(t, "MAX", "agree"))

    def total(self, value: float) -> float:
        """The sum of a number by rank."""
        t = torch.tensor([value], dtype=torch.float64, device=self.device)
        return float(self._reduce(t, "SUM", "agree"))

    def gather(self, part: Tensor) -> Tensor:
        """[world * n], the parts [n] of all ranks in order, on the part's device."""
        import torch.distributed as dist

        with lost():
            mine = part.to(self.device)
            whole = mine.new_empty(self.world * mine.numel())
            dist.all_gather_into_tensor(whole, mine)
        self.traffic.add("gather", (self.world - 1) * mine.numel() * mine.element_size())
        return whole.to(part.device)

    def collect(self, part: Tensor) -> Tensor | None:
        """Gather on rank 0 alone, [world * n], the parts of all ranks in order, on the CPU."""
        import torch.distributed as dist

        mine = part.to(self.device)
        parts = [torch.empty_like(mine) for _ in range(self.world)] if self.main else None
        with lost():
            dist.gather(mine, parts)
        if not self.main:
            self.traffic.add("collect", mine.numel() * mine.element_size())
        return torch.cat([p.cpu() for p in parts]) if parts else None

    def barrier(self) -> None:
        self.largest(0.0)

    def tell(self, message: str | None) -> str | None:
        """Return what rank 0 has to say, on every rank."""
        import torch.distributed as dist

        data = (message or "").encode()
        size = int(self.largest(len(data) if self.main else 0))
        t = torch.zeros(max(size, 1), dtype=torch.uint8, device=self.device)
        if self.main and data:
            t[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)
        with lost():
            dist.broadcast(t, 0)
        return bytes(t[:size].tolist()).decode() or None

    def _reduce(self, t: Tensor, how: str, what: str) -> Tensor:
        import torch.distributed as dist

        with lost():
            dist.all_reduce(t, getattr(dist.ReduceOp, how))
        share = 2 * (self.world - 1) * t.numel() * t.element_size() // self.world
        self.traffic.add(what, share)
        return t


@contextmanager
def lost() -> Iterator[None]:
    """A collective that fails because a rank is gone is a ``RankLost`` that says so; around
    whatever a rank does with a sharded model, as DeepSpeed's gathers fail the same way."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RankLost) or not broken(error):
            raise
        raise RankLost(reason(error)) from None


def broken(error: BaseException) -> bool:
    """Tell whether ``error`` is what a collective raises when another rank is gone or silent."""
    words = ("gloo", "nccl", "connection", "timed out", "timeout", "peer", "socket")
    kinds = ("DistBackendError", "DistNetworkError", "DistStoreError")
    text = str(error).lower()
    return type(error).__name__ in kinds or any(word in text for word in words)


def reason(error: BaseException) -> str:
    rank = os.environ.get("RANK", "?")
    first = str(error).splitlines()[0][:200]
    return (
        f"rank {rank}: another rank of this model ended or did not answer within "
        f"distribution.timeout ({first}); the first error above, of the rank that failed, says why"
    )


def join(
    timeout: float = 600.0, expected: int = 0, place: Mapping[str, object] | None = None
) -> Ranks:
    """Become one of the ranks that the environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT,
    LOCAL_RANK) or ``place``, with the same names, describes; once per process.

    Args:
        timeout: seconds after which a rank that does not answer counts as lost.
        expected: how many ranks the configuration asks for (0: as many as there are).

    Raises:
        ImportError: if DeepSpeed is missing, with the command that installs it.
        ValueError: if this process was not started as a rank, their number is not ``expected``, or
            a build that was killed left a lock that DeepSpeed would wait for.
    """
    require_deepspeed()
    os.environ.update({name: str(value) for name, value in (place or {}).items()})
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(
            f"{missing[0]} is not set: this process is no rank. Start it with "
            "`deepspeed --num_accelerators N launch/train_sharded.py ...` or `torchrun`"
        )
    world = int(os.environ["WORLD_SIZE"])
    check_world(world, expected)
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    find_ninja()
    import deepspeed
    import torch.distributed as dist

    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    quiet(deepspeed)
    if not dist.is_initialized():
        check_builds()
        with lost():
            deepspeed.init_distributed(
                "nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=timeout)
            )
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def check_world(world: int, expected: int, workers: int = 1) -> None:
    """Raises ValueError unless ``world`` ranks are ``workers`` groups of ``expected``."""
    if not expected:
        return
    if world % expected:
        raise ValueError(
            f"distribution.ranks_per_worker={expected} does not divide the {world} ranks that "
            f"were started: start {expected} (--num_accelerators {expected}), or leave it out"
        )
    if world != expected * workers:
        raise ValueError(
            f"distribution.ranks_per_worker={expected}: {world} ranks were started for one model; "
            f"start {expected * workers} (several groups at a time are for distribution=ray)"
        )


def quiet(deepspeed) -> None:
    """DeepSpeed tells every rank's every step; what goes wrong is still told."""
    import logging
    import warnings

    # Of torch 2.13, about a name that DeepSpeed 0.19 and the oldest torch supported here use.
    warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor. is deprecated")
    deepspeed.utils.logger.setLevel(logging.WARNING)


def left(names: Sequence[str] = ()) -> None:
    """Leave the group; a process that joined has to, before it ends."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
