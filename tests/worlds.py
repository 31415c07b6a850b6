"""A run on the embedded world that takes seconds: the settings that several tests share."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from hiedit.catalogue import load_method
from hiedit.config import EvaluateConfig, MethodConfig, TrainConfig
from hiedit.data.stream import StreamConfig
from hiedit.runconfig import DatasetConfig, ModelConfig, RunConfig, TrackingConfig

MODULES = ["model.layers.{3-4}.mlp.gate_proj", "model.layers.{3-4}.mlp.up_proj"]


def quick(name: str) -> MethodConfig:
    """A method with less to measure before it starts and fewer passes."""
    method = load_method(name)
    return dataclasses.replace(
        method,
        selector=dataclasses.replace(method.selector, effect_edits=2),
        updater=dataclasses.replace(method.updater, preserve=40, rank=8, phrasing_edits=3),
        objective=dataclasses.replace(method.objective, back_depth=2),
        passes=dataclasses.replace(method.passes, max=min(method.passes.max, 2)),
    )


def quick_run(directory: Path, **changes) -> RunConfig:
    """Three training edits and a stream of four on the embedded world."""
    values = {
        "model": ModelConfig(modules=MODULES, dtype="float32", device="cpu"),
        "stream": StreamConfig(length=4),
        "train": TrainConfig(edits=3, stream_lengths=[2]),
        "evaluate": EvaluateConfig(points=2, batch=32, examples=1),
        "tracking": TrackingConfig(mode="off"),
        "run_dir": str(directory),
    }
    return RunConfig(**(values | changes))


def records(path: Path, schema: str | None = None, **changes) -> DatasetConfig:
    """The records in ``path``, with its name."""
    return DatasetConfig(path.stem, str(path), schema=schema, **changes)


def weights(model) -> dict[str, torch.Tensor]:
    """A copy of all of the model's tensors."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two models have the same names and bits."""
    return list(one) == list(other) and all(torch.equal(one[n], other[n]) for n in one)
