"""Small models and random edits for the tests of the ledger.

An edit is a pure function of the model and a number, so that any process, also one that has been
killed meanwhile, knows what the weights must be.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hiedit.backbone.modules import EditableModule
from hiedit.ledger.ledger import Ledger
from hiedit.ledger.records import Entry
from hiedit.ledger.state import DeltaState
from hiedit.types import EditRequest, Shift

INTEGERS = {2: torch.int16, 4: torch.int32}


def new_state(
    modules: int = 3,
    inputs: int = 7,
    outputs: int = 5,
    dtype: torch.dtype = torch.float32,
    conv1d: bool = False,
    seed: int = 0,
) -> DeltaState:
    """The base model: the same bits at every call. Some weights are negative zeros."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for index in range(modules):
        i, o = inputs + index % 2, outputs + index % 3
        module = Conv1D(o, i) if conv1d else nn.Linear(i, o)
        weight = torch.randn(module.weight.shape, generator=g)
        weight[torch.rand(weight.shape, generator=g) < 0.1] = -0.0
        module.weight = nn.Parameter(weight.to(dtype))
        name = f"layers.{index}.mlp"
        found[name] = EditableModule(name, module, i, o, conv1d)
    return DeltaState(found)


def entry(
    state: DeltaState, number: int, touched: int | None = None, rank: int | None = None
) -> Entry:
    """Edit ``number``: a random choice of modules, ranks and masks, drawn from the number alone."""
    draw = random.Random(number)
    g = torch.Generator().manual_seed(number)
    names = draw.sample(list(state.modules), touched or draw.randint(1, len(state.modules)))
    shifts = {}
    for name in names:
        module, r = state.modules[name], rank or draw.randint(1, 4)
        A = torch.randn(r, module.in_features, generator=g)
        B = torch.randn(module.out_features, r, generator=g) * 0.1
        scale = torch.randint(0, 3, (r,), generator=g) * 0.7 if draw.random() < 0.5 else None
        if rank:
            scale = None
        if draw.random() < 0.3:
            A, B = A.bfloat16(), B.half()
        shifts[name] = Shift(A, B, scale)
    return Entry(
        EditRequest(f"prompt {number}", f"target {number}"),
        shifts,
        method="random",
        report={"number": number, "success": 1.0},
        memory={"keys": torch.randn(2, 3, generator=g)} if draw.random() < 0.3 else {},
    )


def weights(state: DeltaState) -> dict[str, torch.Tensor]:
    """The bits of every weight."""
    return {
        name: module.weight.detach().view(INTEGERS[module.weight.element_size()]).clone()
        for name, module in state.modules.items()
    }


def expected(numbers: Iterable[int], **model) -> dict[str, torch.Tensor]:
    """The bits after exactly these edits, in this order, on a fresh model without any ledger."""
    state = new_state(**model)
    for number in numbers:
        state.commit(entry(state, number).shifts)
    return weights(state)


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


def in_effect(ledger) -> list[int]:
    """The numbers of the edits in effect, in canonical order."""
    return [
        record.report["number"]
        for record in ledger.history()
        if record.status in ("active", "folded")
    ]


def stored(directory: Path, kind: str = "segments") -> list[Path]:
    """The files of one kind in a ledger."""
    return sorted((directory / kind).iterdir())


def fill(directory, count: int, **model) -> DeltaState:
    """A closed ledger of ``count`` edits, one file each; returns the model with them."""
    state = new_state(**model)
    with Ledger(directory, state) as ledger:
        for number in range(1, count + 1):
            ledger.commit([entry(state, number)])
    return state
