"""The edited, sharded model as an ordinary checkpoint, and its edits as an adapter.

The merged checkpoint is written tensor by tensor: rank 0 collects one whole tensor at a time on
its host and writes a file whenever ``max_shard_bytes`` have come together, so it holds at most one
file's worth and one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hiedit.ledger.directory import check_target, replacing, write_json
from hiedit.sharded.loading import INDEX, ShardedBackbone, stored_tensors
from hiedit.sharded.modules import release
from hiedit.sharded.ranks import Ranks

SHARD_BYTES = 4 << 30


@torch.no_grad()
def save_sharded(
    directory: str | Path,
    backbone: ShardedBackbone,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write the edited model in safetensors, config and tokenizer beside it; every rank calls it.

    ``AutoModelForCausalLM.from_pretrained(directory)`` has the same bits in every weight.

    Raises:
        ValueError: if the directory holds something else than an earlier export.
        OSError: if it cannot be written. Both on every rank.
    """
    ranks, directory = backbone.ranks, Path(directory)
    report = {"kind": "merged", "dtype": str(backbone.model.dtype).removeprefix("torch.")}
    writer = _Writer(max_shard_bytes)

    def collected() -> None:
        for name, tensor in stored_tensors(backbone.model):
            whole = collect(tensor, ranks)
            if ranks.main:
                writer.add(name, whole)

    if not ranks.main:
        if said := ranks.tell(None):
            raise ValueError(said)
        collected()
        if said := ranks.tell(None):
            raise OSError(said)
        return directory
    try:
        check_target(directory, overwrite)
    except ValueError as error:
        ranks.tell(str(error))
        raise
    ranks.tell(None)
    try:
        with replacing(directory, report, overwrite) as temporary:
            writer.begin(temporary)
            collected()
            writer.finish()
            backbone.model.config.save_pretrained(temporary)
            if getattr(backbone.model, "generation_config", None) is not None:
                backbone.model.generation_config.save_pretrained(temporary)
            backbone.tokenizer.save_pretrained(temporary)
    except OSError as error:
        ranks.tell(str(error))
        raise
    ranks.tell(None)
    return directory


def collect(tensor: Tensor, ranks: Ranks) -> Tensor | None:
    """A parameter (or a buffer) whole, on the CPU of rank 0; None on the others."""
    if not hasattr(tensor, "ds_tensor"):
        return tensor.detach().cpu().contiguous() if ranks.main else None
    release(tensor)
    flat = ranks.collect(tensor.ds_tensor.data)
    return None if flat is None else flat[: tensor.ds_numel].view(tensor.ds_shape).clone()


def gathered(backbone: ShardedBackbone) -> dict[str, Tensor]:
    """Return, by name, every tensor whole, on rank 0 (for models that fit there: tests and
    comparisons)."""
    found = {n: collect(t, backbone.ranks) for n, t in stored_tensors(backbone.model)}
    return {n: t for n, t in found.items() if t is not None}


class _Writer:
    """Files of at most ``limit`` bytes (or one tensor), an index over them at the end."""

    def __init__(self, limit: int):
        self.limit, self.held, self.size = limit, {}, 0
        self.written: list[list[str]] = []
        self.total = 0

    def begin(self, directory: Path) -> None:
        self.directory = directory

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.held and self.size + size > self.limit:
            self._flush()
        self.held[name] = tensor
        self.size += size

    def finish(self) -> None:
        self._flush()
        count = len(self.written)
        places: dict[str, str] = {}
        for number, names in enumerate(self.written, start=1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            (self.directory / f"{number}.part").rename(self.directory / final)
            places |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total}, "weight_map": places}
        write_json(self.directory / INDEX, index)

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if self.held:
            place = self.directory / f"{len(self.written) + 1}.part"
            save_file(self.held, place, metadata={"format": "pt"})
            self.written.append(list(self.held))
            self.total += self.size
            self.held, self.size = {}, 0


def adapter_rows(shifts_by_edit, names: list[str]) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Return, by module, ``(A [R, I], B [O, R])`` of all shifts in order, scales multiplied into
    B."""
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for shifts in shifts_by_edit:
        for name, s in shifts.items():
            b = s.B if s.scale is None else s.B * s.scale
            rows.setdefault(name, []).append((s.A.cpu().float(), b.cpu().float()))
    return {
        n: (torch.cat([a for a, _ in rows[n]]), torch.cat([b for _, b in rows[n]], 1))
        for n in names
        if n in rows
    }


def export_sharded_adapter(
    directory: str | Path,
    backbone: ShardedBackbone,
    shifts_by_edit,
    base_name: str | None = None,
    *,
    overwrite: bool = False,
) -> Path | None:
    """A PEFT adapter of all rank rows, exact, from the factors alone: no weight, no accumulator,
    no other rank is asked. Written by rank 0; None on the others.

    Raises:
        ValueError: if no module is edited, or the directory holds something else.
    """
    from safetensors.torch import save_file

    from hiedit.ledger.export import CONFIG, WEIGHTS, adapter_config

    if not backbone.ranks.main:
        return None
    directory = Path(directory)
    check_target(directory, overwrite)
    rows = adapter_rows(shifts_by_edit, backbone.names)
    if not rows:
        raise ValueError("export_adapter: no module is edited; commit an edit first")
    base_name = base_name or str(getattr(backbone.model.config, "_name_or_path", ""))
    ranks = {name: len(a) for name, (a, _) in rows.items()}
    conv1d = all(backbone.modules[name].conv1d for name in rows)
    tensors = {}
    for name, (a, b) in rows.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    with replacing(directory, {"kind": "adapter"}, overwrite) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / CONFIG, adapter_config(backbone.model, ranks, base_name, conv1d))
    return directory
