"""The base model that a ledger belongs to: the editable modules' names, shapes, dtype and bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hiedit.ledger.files import raw

if TYPE_CHECKING:  # it would load transformers, and reading a ledger needs none
    from hiedit.backbone.modules import EditableModule


@dataclass(frozen=True)
class ModuleInfo:
    """One editable module before any edit; rows and columns as the weight is stored.

    sha256: of the weight's bytes, row-major, in hex.
    """

    name: str
    rows: int
    columns: int
    conv1d: bool
    dtype: str
    sha256: str

    @property
    def in_features(self) -> int:
        return self.rows if self.conv1d else self.columns

    @property
    def out_features(self) -> int:
        return self.columns if self.conv1d else self.rows

    @property
    def elements(self) -> int:
        return self.rows * self.columns


def describe(
    modules: Mapping[str, EditableModule | ModuleInfo], stored: Sequence[ModuleInfo] | None = None
):
    """ModuleInfo of every module, in order; the bytes are hashed on as many threads as torch has.

    Args:
        modules: with the weights of the base model, or what was found of them already.
        stored: what they should be; None for a new ledger.

    Raises:
        ValueError: if they are not, naming the first module that differs; names, shapes and dtypes
            are compared before anything is hashed.
    """
    shapes = [_shape(name, module) for name, module in modules.items()]
    if stored is not None:
        _compare_shapes(stored, shapes)
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        hashes = list(pool.map(_hash, modules.values()))
    found = tuple(ModuleInfo(*s, sha256=h) for s, h in zip(shapes, hashes, strict=True))
    for one, other in zip(stored or (), found, strict=bool(stored)):
        if one != other:
            raise ValueError(
                f"the weights of {one.name} are not those of the base model that this ledger "
                f"belongs to (SHA-256 {other.sha256[:12]}…, not {one.sha256[:12]}…): open it on "
                "that base model as it was before any edit (not a merged or otherwise changed "
                "copy, and in the same dtype), or begin a ledger in another directory"
            )
    return found


def _hash(module: EditableModule | ModuleInfo) -> str:
    if isinstance(module, ModuleInfo):
        return module.sha256
    return hashlib.sha256(raw(module.weight)).hexdigest()  # releases the interpreter's lock


def _shape(name: str, module: EditableModule | ModuleInfo) -> tuple:
    if isinstance(module, ModuleInfo):
        return name, module.rows, module.columns, module.conv1d, module.dtype
    rows, columns = module.weight.shape
    return name, rows, columns, module.conv1d, str(module.weight.dtype).removeprefix("torch.")


def _compare_shapes(stored: Sequence[ModuleInfo], shapes: Sequence[tuple]) -> None:
    names, wanted = [s[0] for s in shapes], [info.name for info in stored]
    if names != wanted:
        lacking = [n for n in wanted if n not in names]
        extra = [n for n in names if n not in wanted]
        which = (
            f"it does not name {lacking[0]}" if lacking
            else f"it also names {extra[0]}" if extra
            else "it has another order"
        )  # fmt: skip
        raise ValueError(
            f"modules: {which}; this ledger was begun with these {len(wanted)}: open it with the "
            f"same ({', '.join(wanted)}), or begin a ledger in another directory"
        )
    for info, (name, rows, columns, conv1d, dtype) in zip(stored, shapes, strict=True):
        if (info.rows, info.columns, info.conv1d) != (rows, columns, conv1d):
            raise ValueError(
                f"{name} is {_kind(conv1d)} {rows}x{columns} in this model and "
                f"{_kind(info.conv1d)} {info.rows}x{info.columns} in the ledger, which belongs to "
                "another base model: open it on that one, or begin a ledger in another directory"
            )
        if info.dtype != dtype:
            raise ValueError(
                f"{name} is {dtype} in this model and {info.dtype} in the ledger: load the base "
                f"model with dtype={info.dtype}"
            )


def _kind(conv1d: bool) -> str:
    return "Conv1D" if conv1d else "Linear"
