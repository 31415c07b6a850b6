"""One rank of a group in a plain process, for the test in which another rank is killed.

python tests/sharded_death.py RANK WORLD PORT
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hiedit.methods import build_method  # noqa: E402
from hiedit.runconfig import ModelConfig  # noqa: E402
from hiedit.sharded.group import Place, RankLost, lost, replica  # noqa: E402
from hiedit.types import EditBatch  # noqa: E402
from hiedit.world import world_stream  # noqa: E402
from tests.worlds import MODULES, quick  # noqa: E402

METHOD = quick("closed-form")
PAIRS = [("The capital of France is", "Paris")] * 40
torch.set_num_threads(1)
rank, world, port = map(int, sys.argv[1:4])
model = ModelConfig(modules=MODULES, dtype="float32", device="cpu")
start = time.monotonic()
try:
    with lost():
        backbone = replica(Place(rank, world, port=port), model, timeout=60)
        parts = build_method(backbone, METHOD, (), PAIRS, seed=0)
        for i, request in enumerate(world_stream("test", 4)):
            start = time.monotonic()
            parts.rollout.step(EditBatch((request,), i))
            if i == 1 and rank == world - 1:
                os.kill(os.getpid(), signal.SIGKILL)
except RankLost as error:
    print(f"lost after {time.monotonic() - start:.1f} s: {error}", flush=True)
    os._exit(3)
