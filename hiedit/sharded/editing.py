"""`hiedit edit` over the ranks of one sharded model: the same editor on every rank, in step."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hiedit.editor import Editor
from hiedit.sharded.ledger import shared_ledger
from hiedit.sharded.loading import load_sharded
from hiedit.sharded.ranks import Ranks, join, lost
from hiedit.sharded.saving import save_sharded


class ShardedEditor(Editor):
    """An ``Editor`` whose model is spread over ``ranks``; every rank makes every call."""

    @classmethod
    def over(
        cls, ranks: Ranks, model: str | Path, deepspeed: str = "zero3", **options: Any
    ) -> ShardedEditor:
        """Do as ``Editor.from_pretrained``, for a model by name or directory."""
        return cls.from_pretrained(
            model,
            loader=lambda config: load_sharded(config, ranks, deepspeed),
            open_ledger=lambda place, state: shared_ledger(place, state, ranks),
            **options,
        )

    def save_pretrained(self, directory: str | Path, overwrite: bool = False) -> Path:
        return save_sharded(directory, self._env.backbone, overwrite=overwrite)

    def export_adapter(self, *_: Any, **__: Any):
        raise ValueError("export_adapter: `hiedit export --format adapter` makes it of the ledger")

    def verify(self):
        raise ValueError("verify: `hiedit verify` reads the ledger; it needs no sharded model")


@contextlib.contextmanager
def editing_ranks(timeout: float) -> Iterator[Ranks]:
    """The ranks of the launcher that started this process; inside, only rank 0 has a standard
    output, and that another rank is missed is told as such."""
    ranks = join(timeout)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    with contextlib.ExitStack() as stack:
        if not ranks.main:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        stack.enter_context(lost())
        yield ranks
