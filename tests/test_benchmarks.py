"""Every benchmark's --quick mode runs, prints its table, and refuses to report what is wrong; the
memory formula is that of the parts it speaks of."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import edit_step, flatness, forward_shift, memory, timing  # noqa: E402
from benchmarks.models import mlp_inputs, random_edits, random_llama  # noqa: E402
from benchmarks.train_step import Ours, as_request, word_tokenizer  # noqa: E402
from hiedit import extension  # noqa: E402
from hiedit.backbone.losses import answer_nll  # noqa: E402
from hiedit.backbone.model import Backbone  # noqa: E402
from hiedit.data.tokens import encode  # noqa: E402

QUICK = ["--quick", "--device", "cpu", "--threads", "1"]


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def rows(printed: str, width: int) -> list[list[str]]:
    """The last table: the lines of as many columns, apart by two spaces or more, as its head."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in printed.strip().splitlines()]
    return [line for line in lines[-6:] if len(line) == width]


def test_edit_step(capsys):
    edit_step.main([*QUICK, "--edits", "3"])
    found = {row[0]: row for row in rows(capsys.readouterr().out, 8)}
    assert list(found) == ["outer", "lstsq", "protected"]
    assert all(float(row[7]) < 2e-3 for row in found.values())
    assert float(found["outer"][6]) == 1 and float(found["protected"][6]) > 1  # passes


def test_edit_step_of_a_batch_agrees_too(capsys):
    edit_step.main([*QUICK, "--batch", "3", "--rows", "lstsq"])
    assert rows(capsys.readouterr().out, 8)[-1][0] == "lstsq"


def test_edit_step_refuses_a_wrong_shift(monkeypatch):
    """Ours made 1% larger: that is not the same edit, however fast."""
    from hiedit.updaters.group import ShapeGroup

    solve = ShapeGroup.solve
    monkeypatch.setattr(
        ShapeGroup, "solve", lambda self, *args: [x * 1.005 for x in solve(self, *args)]
    )
    with pytest.raises(SystemExit, match="outer: the two disagree by .*; no speed"):
        edit_step.main([*QUICK, "--rows", "outer"])


def test_forward_shift(capsys):
    forward_shift.main(QUICK)
    (row,) = rows(capsys.readouterr().out, 10)[-1:]
    assert row[0] == "4 x 3" and float(row[9]) < 1e-3


def test_forward_shift_refuses_a_wrong_hook(monkeypatch):
    monkeypatch.setattr(
        "hiedit.backbone.model._add_product", lambda out, h, right: out + h @ right * 1.01
    )
    with pytest.raises(SystemExit, match="rank 4, 3 passes: functional and dense disagree"):
        forward_shift.main(QUICK)


def test_flatness(capsys):
    flatness.main(QUICK)
    found = rows(capsys.readouterr().out, 5)[-4:]
    names = [f"{m}, {where}" for m in flatness.METHODS for where in ("in memory", "ledger")]
    assert [row[0] for row in found] == names
    # A dozen timings of a busy machine say little; the run that counts is in docs/benchmarks.md.
    assert all(0.2 < float(row[4]) < 5 for row in found)


def test_flatness_refuses_weights_that_are_not_the_sum_of_the_edits(monkeypatch):
    monkeypatch.setattr(flatness.DeltaState, "rebuild", lambda *_: None)
    with pytest.raises(SystemExit, match="closed-form, in memory: model.* not the sum"):
        flatness.main([*QUICK, "--methods", "closed-form"])


def test_memory_formula_is_what_a_process_needs(capsys):
    """``main`` leaves by itself where formula and measurement are a fifth apart."""
    memory.main(QUICK)
    found = rows(capsys.readouterr().out, 8)
    assert [row[0] for row in found[-2:]] == ["Llama-3-8B", "Llama-3-70B"]
    assert found[-1][7] == "-" and "%" in found[-3][7]


SHAPE = memory.Shape(64, 256, 8, 300, 2, rank=16)


def build(shape: memory.Shape):
    dtype = {4: torch.float32, 2: torch.bfloat16}[shape.bytes]
    return random_llama(
        shape.hidden, shape.intermediate, shape.layers, shape.heads, shape.vocab, dtype,
        shape.kv_heads,
    )  # fmt: skip


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_memory_of_model_ledger_and_learner(kv_heads):
    shape = replace(SHAPE, kv_heads=kv_heads)
    model = build(shape)
    assert memory.model_bytes(shape) == sum(p.nbytes for p in model.parameters())
    ours = Ours(model, word_tokenizer(shape.vocab), mlp_inputs(range(2, 8)), "outer", shape.rank)
    state, parts = ours.trainer.rollout.env.state, memory.step_bytes(shape)
    state.commit(memory._touch_all(ours.backbone.modules))
    held = [*state.base.values(), *state.acc.values()]
    assert parts["ledger"] == sum(t.nbytes for t in held)
    learned = [p for part in ours.trainer.learner.parts for p in part]
    assert parts["learner"] == pytest.approx(4 * sum(p.nbytes for p in learned), rel=0.02)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("size", [4, 2], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_memory_of_activations(monkeypatch, backend, size, kv_heads):
    """What autograd keeps of the reward's forward pass, the logits apart."""
    monkeypatch.setenv("HIEDIT_BACKEND", backend)
    fused = backend == "auto" and size == 4 and extension.load().available
    shape = replace(SHAPE, bytes=size, kv_heads=kv_heads, fused=fused)
    backbone = Backbone(build(shape), word_tokenizer(shape.vocab), mlp_inputs(range(2, 8)))
    pairs = [(r.prompt, r.target) for r in map(as_request, random_edits(20, shape.vocab))]
    batch = encode(backbone.tokenizer, pairs, padding_side="left")
    stacks = forward_shift.Case(backbone, batch).stacks(1, 1)
    forward_shift._leaves(stacks)
    weights = {p.untyped_storage().data_ptr() for p in backbone.model.parameters()}
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights and shape.vocab not in t.shape:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), backbone.shifted(stacks):
        loss = answer_nll(backbone.answers(batch)).sum()
    assert loss.requires_grad
    formula = memory.step_bytes(replace(shape, tokens=int(batch.attention.sum())))
    assert formula["activations"] == pytest.approx(sum(kept.values()), rel=0.12)


def test_alternation_turns_the_order_around():
    seen: list[str] = []
    runs = {name: lambda n, name=name: seen.append(f"{name}{n}") for name in "ab"}
    taken = timing.alternate(runs, 2, "cpu", warmup=1)
    assert seen == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert {name: len(times) for name, times in taken.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize(
    ("benchmark", "wrong", "message"),
    [
        (edit_step, ["--rows", "inner"], "inner.*among outer, lstsq, protected"),
        (edit_step, ["--layers", "4"], "--layers 4 must be at least 8"),
        (forward_shift, ["--ranks", "0"], "ranks, passes and repeats 1"),
        (flatness, ["--edits", "50"], "--edits 50 .* must exceed --early 100"),
        (memory, ["--edits", "0"], "--edits 0 at least 1"),
    ],
    ids=["rows", "layers", "ranks", "edits", "memory"],
)
def test_bad_options_are_named_before_any_work(benchmark, wrong, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(wrong)
    assert re.search(message, capsys.readouterr().err, re.DOTALL)
