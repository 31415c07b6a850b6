"""A sharded model straight from a checkpoint: every rank reads its own part of every tensor.

Modules are made one at a time under ``zero.Init``, which keeps the rank's part of each and drops
the rest before the next is made; nothing is initialised. Then each rank reads the rows of each
tensor that its flat range lies in, from the (memory-mapped) safetensors, and nothing is sent. So
no process holds more than its shards, one module as it is made and the rows of one tensor:

    peak per rank  <=  model / ranks  +  largest module  +  largest tensor / ranks + two rows
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hiedit.backbone.model import Backbone
from hiedit.backbone.modules import resolve_modules
from hiedit.experiment import check_modules, model_path, place_of
from hiedit.progress import Progress, Update
from hiedit.runconfig import ModelConfig
from hiedit.sharded.modules import sharded_modules, span
from hiedit.sharded.ranks import Ranks
from hiedit.sharded.settings import read_settings, settings

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class ShardedBackbone(Backbone):
    """A ``Backbone`` whose model is the module of a DeepSpeed engine; use is the same.

    The forward pass goes through ``engine.module`` and gradients through ``torch.autograd.grad``:
    the engine itself refuses a model without a parameter to train. The cache of hidden states
    below the lowest editable module is off: ZeRO-3 follows the modules that it knows.
    """

    def __init__(self, engine, tokenizer, modules, ranks: Ranks, read_bytes: int = 0):
        super().__init__(engine.module, tokenizer, modules, prefix_bytes=0)
        self.engine, self.ranks, self.read_bytes = engine, ranks, read_bytes
        self.modules = sharded_modules(self.modules, ranks)

    @property
    def device(self) -> torch.device:
        return self.ranks.device


def load_sharded(
    config: ModelConfig, ranks: Ranks, deepspeed_config: str = "zero3", show: bool = True
) -> ShardedBackbone:
    """The model of ``config`` over ``ranks``; every rank has to call it. show: rank 0 shows
    progress.

    Raises:
        ValueError: if the path holds no model in safetensors, a tensor is missing or has another
            shape, a module is unknown, or the DeepSpeed configuration contradicts the model.
    """
    from transformers import AutoConfig, AutoTokenizer

    check_modules(config)
    if config.edits_on != "device":
        raise ValueError(
            f"model.edits_on={config.edits_on!r}: what commits need is kept where ZeRO-3 keeps the "
            "shards; for host memory use distribution.deepspeed=zero3-offload"
        )
    path, trust = model_path(config.path), config.trust_remote_code
    architecture = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    directory = checkpoint_directory(path)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    dtype = _dtype(config, architecture, directory)
    empty = _empty(architecture, trust)
    smallest = min(
        m.in_features * m.out_features for m in resolve_modules(empty, config.modules).values()
    )
    values = settings(read_settings(deepspeed_config), dtype, smallest)
    model = build(architecture, dtype, values, trust)
    engine = engine_of(model, values)
    restore_buffers(engine.module, architecture, dtype, trust, ranks.device)
    count = read_shards(engine.module, directory, show and ranks.main)
    backbone = ShardedBackbone(engine, tokenizer, config.modules, ranks, count)
    backbone.place = place_of(config)
    return backbone


def _empty(architecture, trust: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(architecture, trust_remote_code=trust)


def build(architecture, dtype: torch.dtype, values: Mapping[str, Any], trust: bool) -> nn.Module:
    """The model with partitioned parameters whose values are not set."""
    import deepspeed
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    # Init takes the dtype from `values`; given both, it falls back to bf16 on a CPU.
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=dict(values)):
        model = AutoModelForCausalLM.from_config(architecture, dtype=dtype, trust_remote_code=trust)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def restore_buffers(model: nn.Module, architecture, dtype, trust: bool, device) -> None:
    """Return what is computed and not stored (rotary frequencies), as a model that is not sharded
    has it: ``zero.Init`` and the engine round it to the weights' dtype, which shifts every
    position."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights(), _parameters_on_meta():
        fresh = AutoModelForCausalLM.from_config(architecture, dtype=dtype, trust_remote_code=trust)
    for name, value in fresh.named_buffers():
        place, _, leaf = name.rpartition(".")
        model.get_submodule(place)._buffers[leaf] = value.to(device)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Have parameters registered without storage and buffers as ever."""
    register = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        empty = value if value is None else nn.Parameter(value.to("meta"), value.requires_grad)
        register(module, name, empty)

    nn.Module.register_parameter = registered
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def engine_of(model: nn.Module, values: Mapping[str, Any]):
    """DeepSpeed's engine around a frozen model; only its hooks are used."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=dict(values))
    engine.module.eval()
    return engine


def checkpoint_directory(path: str) -> Path:
    """Return where the checkpoint's files are; a hub name is fetched (by every node once)."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model"]))


def files(directory: Path) -> dict[str, Path]:
    """Return, by tensor, the file of the checkpoint that holds it.

    Raises:
        ValueError: if there are no safetensors, or a file of the index is missing.
    """
    from safetensors import SafetensorError, safe_open

    if (directory / INDEX).is_file():
        named = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
        found = {name: directory / file for name, file in named.items()}
        missing = sorted({p.name for p in found.values() if not p.is_file()})
        if missing:
            raise ValueError(f"{directory}: {INDEX} names {missing[0]}, which is not there")
        return found
    if not (directory / SINGLE).is_file():
        raise ValueError(
            f"model.path={str(directory)!r}: no {INDEX} and no {SINGLE}; a sharded model is read "
            "from safetensors (save_pretrained writes them)"
        )
    try:
        with safe_open(directory / SINGLE, "pt") as f:
            return dict.fromkeys(f.keys(), directory / SINGLE)
    except SafetensorError as error:
        raise ValueError(f"{directory / SINGLE} is damaged: {error}") from None


@torch.no_grad()
def read_shards(model: nn.Module, directory: Path, show: bool) -> int:
    """Fill this rank's part of every parameter, and every buffer that the checkpoint holds; returns
    the bytes that were read."""
    from safetensors import SafetensorError, safe_open

    where = files(directory)
    wanted = dict(stored_tensors(model))
    absent = [name for name in wanted if name not in where]
    if absent:
        raise ValueError(
            f"{directory}: the checkpoint has no {absent[0]} (of {len(absent)} missing); it holds "
            f"{len(where)} tensors, for example {sorted(where)[0]}"
        )
    by_file: dict[Path, list[str]] = {}
    for name in wanted:
        by_file.setdefault(where[name], []).append(name)
    with Progress() as progress:
        done = count = 0
        for path, names in by_file.items():
            try:
                with safe_open(path, "pt") as f:
                    for name in names:
                        count += _read(wanted[name], f.get_slice(name), name)
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged: {error}") from None
            done += len(names)
            if show:
                progress.show(Update("load", "tensors", done, len(wanted)))
    return count


def _read(target: Tensor, source, name: str) -> int:
    """Fill ``target`` from the rows of ``source`` that it lies in; returns their bytes."""
    shape = tuple(source.get_shape())
    expected = tuple(getattr(target, "ds_shape", target.shape))
    if shape != expected:
        raise ValueError(f"{name} is {shape} in the checkpoint; the model's config says {expected}")
    if not hasattr(target, "ds_tensor"):
        target.copy_(source[:] if shape else source[...])
        return target.numel() * target.element_size()
    start, end = span(target)
    if start == end:
        return 0
    columns = target.ds_numel // shape[0]
    first, last = start // columns, -(-end // columns)
    rows = source[first:last].reshape(-1)
    target.ds_tensor.data[: end - start].copy_(
        rows[start - first * columns : end - first * columns]
    )
    return rows.numel() * rows.element_size()


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, tied ones once, and persistent buffers, as a checkpoint names them."""
    yield from model.named_parameters()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in model.state_dict().items():
        if name not in parameters:
            yield name, value


def _dtype(config: ModelConfig, architecture, directory: Path) -> torch.dtype:
    """Do as ``from_pretrained`` decides: what is asked for, the config's, else that of the
    weights."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    named = getattr(architecture, "dtype", None)
    if named is not None:
        return getattr(torch, named) if isinstance(named, str) else named
    from safetensors import safe_open

    name, path = next(iter(files(directory).items()))
    with safe_open(path, "pt") as f:
        return f.get_slice(name)[:1].dtype
