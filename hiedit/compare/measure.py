"""One cell, from its configuration to its numbers: train (or fetch the trained editor), edit, ask.

Cell -> load_world -> build_method -> train -> edit the stream -> scores at every horizon
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hiedit.compare.cells import Cell, read_cell, write_cell
from hiedit.compare.oracle import TruthSelector
from hiedit.compare.worlds import StandingProbe, World, load_world
from hiedit.evaluation.results import stream_fingerprint
from hiedit.methods import Method, build_method, load_editor, save_editor
from hiedit.types import EditBatch
from hiedit.world.train import use_threads

Tell = Callable[[int], None]  # told of every edit done


@use_threads(1)  # sums depend on it: a cell finds the same whatever runs beside it
def run_cell(cell: Cell, run_dir: str, send: Callable[[Any], None]) -> dict[str, Any]:
    """Run ``cell`` on one thread and write its result, unless it is there; sends (edits done, the
    cell).

    Raises:
        ValueError: naming the cell, where its method cannot run.
    """
    found = read_cell(run_dir, cell)
    if found is not None:
        send((cell.edits, cell))
        return found
    told = 0

    def tell(edits: int) -> None:
        nonlocal told
        told += edits
        send((edits, cell))

    try:
        result = measure(cell, run_dir, tell)
    except ValueError as error:
        raise ValueError(f"{cell.describe()}: {error}") from None
    write_cell(run_dir, cell, result)
    send((cell.edits - told, cell))  # training that another cell had done
    return result


def measure(cell: Cell, run_dir: str, tell: Tell) -> dict[str, Any]:
    """The cell's result: ``points``, one for each horizon, and ``choices``, by edit."""
    wall, cpu = time.perf_counter(), time.process_time()
    world = load_world(cell.setup, run_dir)
    method, train_seconds = trained(cell, world, run_dir, tell)
    extra = dict(cell.extra)
    relations = extra.get("relations")
    requests = world.stream(cell.phase, cell.horizons[-1], cell.seed, relations)
    probe = StandingProbe(world.backbone, requests, cell.setup.batch)
    if extra.get("truth"):
        method.rollout.selector = TruthSelector(method.rollout.selector, world.truth)
    chosen = _Choices(method)
    points, masks, passes, seconds = [], [], [], 0.0
    try:
        method.rollout.reset()
        for index, request in enumerate(requests):
            start = time.perf_counter()
            chosen.begin()
            if extra.get("truth"):
                method.rollout.selector.relation = request.relation
            outcome = method.rollout.step(EditBatch((request.unaided(),), index))
            seconds += time.perf_counter() - start
            masks.append(outcome.mask.cpu())
            passes.append(outcome.passes)
            tell(1)
            if index + 1 in cell.horizons:
                point = _point(probe, index + 1, cell.setup.retention_share)
                touched = torch.cat(masks).sum(-1)
                point |= {
                    "layers_per_edit": float(touched.mean()),
                    "layers_sd": float(touched.std()) if len(touched) > 1 else 0.0,
                    "passes_per_edit": sum(passes) / (index + 1),
                    "seconds_per_edit": seconds / (index + 1),
                    "stream": stream_fingerprint(requests[: index + 1]),
                }
                points.append(point)
    finally:
        chosen.close()
        method.rollout.reset()
    return {
        "label": cell.label,
        "points": points,
        "before": vars(probe.before.scores()),
        "modules": method.rollout.updater.names,
        "choices": {
            "relations": [r.relation for r in requests],
            "masks": ["".join(str(int(v)) for v in mask[0].tolist()) for mask in masks],
            "logits": chosen.rows(),
        },
        "train_seconds": train_seconds,
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
    }


def _point(probe: StandingProbe, edits: int, retention_share: float) -> dict[str, Any]:
    """Scores after ``edits`` edits, and of the earliest of them that still hold."""
    found = probe.measure(edits)
    early = max(1, round(edits * retention_share))
    held = probe.scored(edits)
    return {
        "edits": edits,
        "asked": held,
        "scores": vars(found.scores()),
        "retention": vars(found.scores(slice(0, early))),
    }


def trained(
    cell: Cell, world: World, run_dir: str, tell: Tell = lambda n: None
) -> tuple[Method, float]:
    """The method of ``cell`` ready to edit, and the seconds that its training took (0 where the
    editor was there); an editor is kept under RUN_DIR/editors for the cells that share it."""
    start = time.perf_counter()
    place = Path(run_dir) / "editors" / cell.editor_key
    train = cell.setup.train
    if not (cell.learned and train.edits):
        method = build_method(world.backbone, cell.method, world.train, world.preserve, cell.seed)
        return method, 0.0
    if (place / "method.json").is_file():
        return load_editor(world.backbone, place, cell.seed), 0.0
    method = build_method(world.backbone, cell.method, world.train, world.preserve, cell.seed)
    trainer = method.trainer(train, cell.seed)
    trainer.run(world.train, train, cell.seed, lambda step: tell(train.n_edits), None)
    fresh = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    save_editor(method, fresh)
    try:
        fresh.rename(place)  # whole or not at all
    except OSError:  # another process was as fast; its editor is the same
        shutil.rmtree(fresh)
    method.rollout.reset()
    return method, time.perf_counter() - start


class _Choices:
    """The policy's logits at the first pass of every edit; nothing for other selectors."""

    def __init__(self, method: Method):
        self._found: list[Tensor | None] = []
        self._handle = method.rollout.selector.register_forward_hook(self._note)

    def begin(self) -> None:
        self._found.append(None)

    def _note(self, _, __, action) -> None:
        if self._found and self._found[-1] is None and action.logits is not None:
            self._found[-1] = action.logits.detach()[0].cpu()

    def rows(self) -> list[list[float] | None] | None:
        if not any(row is not None for row in self._found):
            return None
        return [r if r is None else [round(v, 4) for v in r.tolist()] for r in self._found]

    def close(self) -> None:
        self._handle.remove()
