"""Commits in memory: all of an edit or nothing of it, nothing that is not finite, same bits."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import hiedit.ledger.state
from hiedit.backbone.host import on_host
from hiedit.backbone.modules import EditableModule
from hiedit.ledger.state import DeltaState
from hiedit.types import Shift

I, O = 37, 53  # noqa: E741


def layers(dtype=torch.bfloat16, scale=1.0):
    """Two linear layers and a Conv1D, by name, and the same as editable modules."""
    g = torch.Generator().manual_seed(0)
    found = {"a": nn.Linear(I, O, bias=False), "b": nn.Linear(I, O, bias=False), "c": Conv1D(O, I)}
    for layer in found.values():
        layer.weight.data = (torch.randn(layer.weight.shape, generator=g) * scale).to(dtype)
        layer.weight.data.view(-1)[3] = -0.0
    modules = {
        name: EditableModule(name, layer, I, O, isinstance(layer, Conv1D))
        for name, layer in found.items()
    }
    return modules


def weights(modules):
    return {name: module.weight.data.clone() for name, module in modules.items()}


def same(one, other):
    """Equal bits, negative zeros included."""
    whole = {2: torch.int16, 4: torch.int32}
    return one.keys() == other.keys() and all(
        torch.equal(t.view(whole[t.element_size()]), other[k].view(whole[t.element_size()]))
        for k, t in one.items()
    )


def shift(seed, rank=3, scale=None, size=0.1):
    g = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, I, generator=g), torch.randn(O, rank, generator=g) * size
    return Shift(A, B, scale)


def stream(n=30):
    """Edits of different ranks, masks and factor dtypes that touch one to three modules."""
    for t in range(n):
        names = ["a", "b", "c"][t % 3 :] if t % 4 else ["b"]
        edit = {}
        for j, name in enumerate(names):
            rank = 1 + (t + j) % 5
            s = None if t % 2 else torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0][:rank])
            found = shift(10 * t + j, rank, s)
            edit[name] = Shift(found.A.bfloat16(), found.B, s) if t % 7 == 0 else found
        yield edit


def committed(edits, dtype=torch.bfloat16):
    modules = layers(dtype)
    state = DeltaState(modules)
    for edit in edits:
        state.commit(edit)
    return state, modules


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 256], ids=lambda n: f"blocks-of-{n}")
def test_a_rebuild_has_the_bits_of_commits_one_by_one(rows, dtype, monkeypatch):
    monkeypatch.setattr(hiedit.ledger.state, "BLOCK_ROWS", rows)
    kept = [edit for t, edit in enumerate(stream()) if t % 3]
    expected, expected_modules = committed(kept, dtype)
    state, modules = committed(stream(), dtype)
    assert not same(weights(modules), weights(expected_modules))
    state.rebuild(["a", "b", "c"], iter(kept))
    assert same(weights(modules), weights(expected_modules))
    assert same(state.acc, expected.acc) and same(state.base, expected.base)
    for s, m in ((state, modules), (expected, expected_modules)):
        s.commit(next(stream()))  # and goes on from there like the other
        assert same(weights(m), weights(m))
    assert same(weights(modules), weights(expected_modules))


def test_a_rebuild_begins_where_a_snapshot_ends():
    edits = list(stream())
    first, _ = committed(edits[:20])
    expected, expected_modules = committed(edits)
    snapshot = {name: acc.clone() for name, acc in first.acc.items()}
    modules = layers()
    state = DeltaState(modules)
    state.rebuild(modules, iter(edits[20:]), start=snapshot)
    assert same(weights(modules), weights(expected_modules)) and same(state.acc, expected.acc)
    assert same(snapshot, first.acc)  # copied, not taken over


def test_a_rebuild_touches_the_named_modules_only():
    state, modules = committed(stream())
    before, acc = weights(modules), {n: t.clone() for n, t in state.acc.items()}
    state.rebuild(["b"], list(stream())[:5])
    _, expected = committed(list(stream())[:5])
    assert same({"b": modules["b"].weight.data}, {"b": expected["b"].weight.data})
    for name in ("a", "c"):
        assert same({name: modules[name].weight.data}, {name: before[name]})
        assert same({name: state.acc[name]}, {name: acc[name]})
    assert state.edits == 30


def test_a_module_without_active_shifts_is_its_base_and_costs_nothing():
    state, modules = committed(stream())
    state.rebuild(modules, [{"a": shift(1)}])
    untouched = layers()
    for name in ("b", "c"):
        assert same({name: modules[name].weight.data}, {name: untouched[name].weight.data})
    assert set(state.acc) == set(state.base) == {"a"}
    masked = Shift(shift(1).A, shift(1).B, torch.zeros(3))
    state.rebuild(modules, [{"a": masked}])
    assert same(weights(modules), weights(untouched)) and not state.acc
    state.commit({"a": masked, "b": Shift(torch.ones(0, I), torch.ones(O, 0))})
    assert same(weights(modules), weights(untouched)) and not state.acc and not state.base


def test_a_rebuild_that_fails_changes_nothing():
    state, modules = committed(stream())
    before, acc = weights(modules), {n: t.clone() for n, t in state.acc.items()}

    def damaged():
        yield from list(stream())[:7]
        raise OSError("segment 3 is damaged")

    bad = {"a": Shift(torch.full((1, I), torch.inf), torch.ones(O, 1))}
    wrong = {"a": torch.zeros(O, I, dtype=torch.float64)}
    for shifts, start, error in [
        (damaged(), None, pytest.raises(OSError, match="segment 3")),
        ([*stream(), bad], None, pytest.raises(ValueError, match="shift of a is not finite")),
        (stream(), wrong, pytest.raises(ValueError, match="must be torch.float32")),
        ([], {"a": torch.full((O, I), torch.nan)}, pytest.raises(ValueError, match="a: .*finite")),
    ]:
        with error:
            state.rebuild(modules, shifts, start)
        assert same(weights(modules), before) and same(state.acc, acc)


OVERFLOW = Shift(torch.full((1, I), 3e38), torch.full((O, 1), 3e38))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"b": Shift(torch.full((1, I), torch.nan), torch.ones(O, 1))}, "shift of b is not finite"),
        ({"b": Shift(torch.ones(1, I), torch.full((O, 1), -torch.inf))}, "shift of b is not finit"),
        ({"b": Shift(torch.ones(1, I), torch.ones(O, 1), torch.tensor([torch.nan]))}, "not finite"),
        ({"b": OVERFLOW}, r"b: .*not finite in torch.float16 \(largest base weight"),
        ({"b": Shift(torch.full((1, I), 300.0), torch.full((O, 1), 300.0))}, "not finite in"),
        ({"b": Shift(torch.ones(1, I + 1), torch.ones(O, 1))}, r"A \(1, 38\).*A must be \[r, 37\]"),
        ({"b": Shift(torch.ones(2, I), torch.ones(O, 2), torch.ones(3))}, r"scale \(3,\)"),
        ({"nowhere": shift(0)}, "nowhere is not an editable module; these are: a, b, c"),
    ],
    ids=["nan", "inf", "nan-scale", "product", "dtype", "shape", "scale", "name"],
)  # fmt: skip
def test_a_refused_commit_changes_no_module(bad, message):
    modules = layers(torch.float16)
    state = DeltaState(modules)
    state.commit({"b": shift(5)})
    before, acc = weights(modules), {n: t.clone() for n, t in state.acc.items()}
    with pytest.raises(ValueError, match=message):
        state.commit({"a": shift(1), **bad, "c": shift(2)})
    assert same(weights(modules), before) and same(state.acc, acc) and state.edits == 1


def test_the_benchmark_runs(capsys):
    """Small: that it measures, checks the bits first and prints what it promises."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks import ledger_commit

    ledger_commit.main(["--quick", "--ranks", "2"])
    out = capsys.readouterr().out
    assert "k = 2" in out and "median" in out
    errors = re.search(r"accumulator (\S+), naive bf16 (\S+)", out)
    assert float(errors[1]) <= 1e-6 < 0.9 < float(errors[2])
    with pytest.raises(SystemExit):
        ledger_commit.main(["--chosen", "13"])
    assert "--chosen 13 must be 1 to --modules (12)" in capsys.readouterr().err


def test_edits_kept_on_the_host_have_the_same_bits():
    """Commits, a rebuild, a reset and the base weights for a moment: the layer computes with what
    it would have had, and nothing of a module that no edit touches is kept."""
    plain, ours = layers(), {name: on_host(module) for name, module in layers().items()}
    states = DeltaState(plain), DeltaState(ours)
    edits = list(stream())
    for edit in edits:
        for state in states:
            state.commit(edit)
        assert same(weights(plain), weights(ours))
    touched = {name for edit in edits for name in edit}
    assert {name for name, module in ours.items() if module.copies} == touched
    first = ours["a"]
    assert first.stored.data_ptr() != first.weight.data_ptr()
    for state in states:
        state.rebuild(["a", "b"], iter(edits[3:]))
    assert same(weights(plain), weights(ours))
    edited = weights(ours)
    with states[0].base_weights(), states[1].base_weights():
        assert same(weights(plain), weights(ours)) and not same(weights(ours), edited)
    assert same(weights(ours), edited)
    for state in states:
        state.reset()
    assert same(weights(plain), weights(ours)) and same(weights(ours), weights(layers()))
    for state in states:
        state.commit(edits[0])
    assert same(weights(plain), weights(ours)) and states[1].growth() == states[0].growth()
