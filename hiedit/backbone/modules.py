"""The layers that may be edited: names, patterns with ranges, or a stated default."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

# The MLP's input projections as the architectures call them.
MLP_INPUTS = (
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "fc1",
    "fc_in",
    "c_fc",
    "dense_h_to_4h",
    "w1",
    "w3",
)
# And its output projections, which the default edits: as a name's end, because GPT-2 calls the
# attention's output c_proj too.
MLP_OUTPUTS = (
    "down_proj",
    "fc2",
    "fc_out",
    "mlp.c_proj",
    "dense_4h_to_h",
    "w2",
)
_RANGE = re.compile(r"\{([0-9,\- ]+)\}")
_BOUNDS = re.compile(r" *(\d+) *(?:- *(\d+) *)?")


@dataclass(frozen=True)
class EditableModule:
    """A linear layer that edits may change.

    ``weight`` is [O, I] for ``nn.Linear`` and [I, O] for ``Conv1D`` (``conv1d`` is then True).
    """

    name: str
    module: nn.Module
    in_features: int
    out_features: int
    conv1d: bool

    @property
    def weight(self) -> torch.Tensor:
        return self.module.weight

    @property
    def stored(self) -> torch.Tensor:
        """Return what of the weight is kept here and what commits write to: all of it, [O, I] or
        [I, O]. A shard of a model that is spread over ranks is flat."""
        return self.module.weight.data

    @property
    def span(self) -> tuple[int, int]:
        """The flat range of the row-major weight that ``stored`` is."""
        return 0, self.in_features * self.out_features

    def store(self, weight: torch.Tensor) -> None:
        """``weight``, like ``stored``, takes its place; nothing is copied."""
        self.module.weight.data = weight

    def held(self) -> torch.Tensor:
        """Return what ``store`` puts back later."""
        return self.stored

    def written(self) -> None:
        """Note that ``stored`` was written to; the layer computes with it from then on."""

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """Select, of a tensor with an element for each of the weight's, those that belong to
        ``stored``."""
        return whole

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """The inverse of ``part``; every rank has to call it."""
        return part

    def largest(self, value: float) -> float:
        """The largest of a number by rank; every rank has to call it."""
        return value

    def total(self, value: float) -> float:
        """The sum of a number by rank; every rank has to call it."""
        return value

    @property
    def shape(self) -> tuple[int, int]:
        """(I, O); modules of one shape share a hypernetwork and are computed in one batch."""
        return self.in_features, self.out_features


def linear_layers(model: nn.Module) -> dict[str, EditableModule]:
    """Every ``nn.Linear`` and ``Conv1D`` of ``model`` except the output embedding, in its order."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = {}
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, nn.Linear):
            i, o, conv = module.in_features, module.out_features, False
        elif isinstance(module, Conv1D):
            i, o, conv = module.nx, module.nf, True
        else:
            continue
        found[name] = EditableModule(name, module, i, o, conv)
    return found


def expand_ranges(pattern: str) -> list[str]:
    """``layers.{3-5}.x`` -> three names; ``{1,4-6}`` is allowed.

    Raises:
        ValueError: if a range runs backwards or is not a list of numbers.
    """
    match = _RANGE.search(pattern)
    if not match:
        return [pattern]
    numbers: list[int] = []
    for part in match.group(1).split(","):
        bounds = _BOUNDS.fullmatch(part)
        low, high = (int(bounds[1]), int(bounds[2] or bounds[1])) if bounds else (1, 0)
        if high < low:
            raise ValueError(
                f"modules: {pattern!r} has the range {{{match.group(1)}}}; "
                "write {first-last} or {a,b,c} with first <= last"
            )
        numbers += range(low, high + 1)
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [name for n in numbers for name in expand_ranges(f"{head}{n}{tail}")]


def candidates(model: nn.Module) -> dict[str, int]:
    """The MLP's output projections with the number of the layer of each, in the model's order.

    Raises:
        ValueError: if no layer of the model has a name known for that role.
    """
    ends = tuple(f".{end}" for end in MLP_OUTPUTS)
    names = [n for n in linear_layers(model) if f".{n}".endswith(ends)]
    found = {n: int(m.group(1)) for n in names if (m := re.search(r"\.(\d+)\.", n))}
    if not found:
        raise ValueError(
            "modules: this model has no MLP output projection under a known name "
            f"({', '.join(MLP_OUTPUTS)}); name the modules, for example "
            f"{list(linear_layers(model))[:3]}"
        )
    return found


def default_modules(model: nn.Module) -> list[str]:
    """The MLP output projections between an eighth and a half of the depth: what is edited where
    nobody names modules and nothing was measured.

    Raises:
        ValueError: as ``candidates``.
    """
    layer_of = candidates(model)
    count = max(layer_of.values()) + 1
    low = min(-(-count // 8), count - 1)
    high = max(low + 1, count // 2)
    return [n for n, layer in layer_of.items() if low <= layer < high]


def resolve_modules(
    model: nn.Module, spec: str | Sequence[str] | None = None
) -> dict[str, EditableModule]:
    """The editable modules that ``spec`` names, in the model's own order.

    ``spec`` is a name or a list of names; ``{4-9}`` expands to numbers and ``*`` matches as in a
    shell. None means ``default_modules``.

    Raises:
        ValueError: if a pattern matches no linear layer; names the nearest that exist.
    """
    layers = linear_layers(model)
    if spec is None:
        spec = default_modules(model)
    chosen: set[str] = set()
    for pattern in [spec] if isinstance(spec, str) else spec:
        for name in expand_ranges(pattern):
            hits = [name] if name in layers else fnmatch.filter(layers, name)
            if not hits:
                near = difflib.get_close_matches(name, layers, n=3, cutoff=0.3)
                raise ValueError(
                    f"modules: {name!r} (from {pattern!r}) is no linear layer of this model; "
                    f"nearest: {', '.join(near) or ', '.join(list(layers)[:3])}"
                )
            chosen.update(hits)
    if not chosen:
        raise ValueError(f"modules: {spec!r} names no module; give at least one")
    return {name: layer for name, layer in layers.items() if name in chosen}
