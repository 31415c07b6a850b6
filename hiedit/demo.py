"""The runs of `hiedit demo`: on a real model, or on the embedded one.

    real:  the model is asked what it knows -> records -> methods side by side, one of them trained
    world: its own facts -> methods side by side, several trained

What takes time to import is imported where it is needed: the command line reads this file for its
help.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hiedit.config import MethodConfig
    from hiedit.runconfig import RunConfig

REAL = "smollm2-135m"
REAL_METHODS = ("no-edit", "ultraedit", "closed-form", "hiedit-real")
REAL_EDITS, REAL_TRAIN = 50, 20
WORLD_METHODS = ("no-edit", "ultraedit", "static", "rledit", "random", "hiedit")
WORLD_EDITS, WORLD_TRAIN = 200, 100
POINTS = 3  # moments of the stream at which everything is asked; asking takes longer than editing
EXAMPLES = 5
PROTECTED, OWN_TEXT = 1000, 128  # sentences and texts at most; measuring more takes minutes
EVERYDAY = (
    "The president of the United States lives in the",
    "The largest planet in the solar system is",
    "Romeo and Juliet was written by",
    "The first month of the year is",
    "Bees collect nectar to make",
    "My favourite colour is",
)


def real_config(
    model: str, edits: int, train: int, seed: int, run_dir: Path, tracking: str
) -> RunConfig:
    """The demo on ``model``.

    Raises:
        ValueError: if it is a model of `hiedit models` that is not here, with what to do.
    """
    from hiedit.models.registry import KNOWN, is_here
    from hiedit.runconfig import ModelConfig

    if model in KNOWN and not is_here(KNOWN[model]):
        raise ValueError(
            f"model {model!r} is not here: `hiedit models get {model}` brings it (or `hiedit demo "
            "--world`: the same on a small model that comes with HiEdit)"
        )
    config = _composed(
        edits, train, seed, run_dir, tracking, ["dataset=known", f"evaluate.points={POINTS}"]
    )
    evaluate = dataclasses.replace(config.evaluate, examples=EXAMPLES, everyday=list(EVERYDAY))
    return dataclasses.replace(
        config, model=ModelConfig(Path(model).name, model, dtype="float32"), evaluate=evaluate
    )


def quicker(method: MethodConfig) -> MethodConfig:
    """``method``, protecting no more than can be measured in a minute."""
    u = method.updater
    updater = dataclasses.replace(
        u, preserve=min(u.preserve, PROTECTED), own_text=min(u.own_text, OWN_TEXT)
    )
    return dataclasses.replace(method, updater=updater)


def world_config(
    edits: int, train: int, seed: int, run_dir: Path, tracking: str, more: Sequence[str] = ()
) -> RunConfig:
    """The demo on the embedded world; ``more``: further overrides."""
    return _composed(edits, train, seed, run_dir, tracking, more)


def _composed(
    edits: int, train: int, seed: int, run_dir: Path, tracking: str, more: Sequence[str]
) -> RunConfig:
    from hiedit.compose import compose

    return compose(
        [
            f"stream.length={edits}",
            f"stream.seed={seed}",
            f"seed={seed}",
            f"train.edits={train}",
            f"run_dir={run_dir}",
            f"tracking.mode={tracking}",
            *more,
        ]
    )
