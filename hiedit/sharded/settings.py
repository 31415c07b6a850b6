"""The DeepSpeed configuration of a run: a JSON of ``configs/deepspeed`` or of the user, completed
by what the model's configuration already says, and refused where it says otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hiedit.catalogue import config_dir

OURS = {"float32": None, "bfloat16": "bf16", "float16": "fp16"}
FIXED = {  # by key below zero_optimization: what it must be, and why
    "stage": (3, "only stage 3 shards parameters"),
    "zero_quantized_weights": (False, "gathered weights would not be those of the ledger"),
    "zero_quantized_nontrainable_weights": (False, "weights would not be those of the ledger"),
    "zero_hpz_partition_size": (1, "a second copy of the shards would not see the commits"),
    "stage3_prefetch_bucket_size": (0, "a commit must find no weight on its way"),
    "stage3_max_reuse_distance": (0, "a gathered weight must not outlive its layer"),
}
REFUSED = ("optimizer", "scheduler", "gradient_clipping", "compression_training", "autotuning")


def read_settings(name: str) -> dict[str, Any]:
    """The JSON called ``name`` (of ``configs/deepspeed``, without ending, or a path).

    Raises:
        ValueError: if there is none, or it is no JSON object.
    """
    known = config_dir() / "deepspeed"
    path = Path(name) if name.endswith(".json") else known / f"{name}.json"
    if not path.is_file():
        valid = ", ".join(sorted(p.stem for p in known.glob("*.json")))
        raise ValueError(
            f"distribution.deepspeed={name!r}: there is no such file; valid are {valid}, or a path"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"distribution.deepspeed={name!r}: no JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"distribution.deepspeed={name!r}: {type(values).__name__}, not an object")
    return values


def settings(given: dict[str, Any], dtype: torch.dtype, smallest: int) -> dict[str, Any]:
    """``given`` completed for a model of ``dtype``.

    smallest: elements of the smallest editable weight, which ZeRO-3 must not keep whole on every
    rank (a commit writes to shards).

    Raises:
        ValueError: for a key that contradicts the model or the ledger, naming it and what is valid.
    """
    for key in REFUSED:
        if key in given:
            raise ValueError(
                f"deepspeed: {key}={json.dumps(given[key])}: the model is frozen and trained by "
                "nobody; the editor's learner is set by method.* and train.*; leave it out"
            )
    zero = dict(given.get("zero_optimization") or {})
    for key, (value, why) in FIXED.items():
        if zero.setdefault(key, value) != value:
            raise ValueError(
                f"deepspeed: zero_optimization.{key}={json.dumps(zero[key])}: it must be "
                f"{json.dumps(value)}: {why}"
            )
    if (zero.get("offload_param") or {}).get("device", "none") not in ("none", "cpu"):
        raise ValueError(
            f"deepspeed: zero_optimization.offload_param.device="
            f"{json.dumps(zero['offload_param']['device'])}: valid are none and cpu, where commits "
            "can write"
        )
    if zero.get("offload_optimizer"):
        raise ValueError(
            "deepspeed: zero_optimization.offload_optimizer: the frozen model has no optimizer; "
            "leave it out"
        )
    threshold = zero.setdefault("stage3_param_persistence_threshold", min(100_000, smallest - 1))
    if threshold >= smallest:
        raise ValueError(
            f"deepspeed: zero_optimization.stage3_param_persistence_threshold={threshold}: it must "
            f"be below {smallest}, the elements of the smallest editable weight"
        )
    whole = {k: v for k, v in given.items() if k != "zero_optimization"}
    whole = whole | {"zero_optimization": zero} | _precision(given, dtype)
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if whole.setdefault(key, 1) != 1:
            raise ValueError(
                f"deepspeed: {key}={json.dumps(whole[key])}: batches are made by stream.n_edits "
                "and method.objective; it must be 1 or left out"
            )
    if "train_batch_size" in whole:
        raise ValueError(
            f"deepspeed: train_batch_size={json.dumps(whole['train_batch_size'])}: batches are "
            "made by stream.n_edits and method.objective; leave it out"
        )
    return whole


def offloads(values: dict[str, Any]) -> bool:
    """Tell whether the shards stand in the memory of the host."""
    zero = values.get("zero_optimization") or {}
    return (zero.get("offload_param") or {}).get("device", "none") == "cpu"


def _precision(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    wanted = OURS[str(dtype).removeprefix("torch.")]
    for key in ("bf16", "fp16"):
        enabled = (given.get(key) or {}).get("enabled")
        if enabled not in (None, "auto", key == wanted):
            raise ValueError(
                f"deepspeed: {key}.enabled={json.dumps(enabled)} and the model is {dtype} "
                "(model.dtype): make them agree, or leave the key out"
            )
    return {key: {"enabled": key == wanted} for key in ("bf16", "fp16")}
