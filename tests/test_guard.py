"""What is watched, and what becomes of an edit that moves it: made smaller, or kept out."""

import dataclasses
import math

import pytest
import torch
from models import tiny_model, tiny_tokenizer

from hiedit import Editor
from hiedit.backbone.model import Backbone
from hiedit.config import (
    EvaluateConfig,
    MethodConfig,
    PassesConfig,
    SelectorConfig,
    TrainConfig,
    UpdaterConfig,
)
from hiedit.edited import COMMITTED, REJECTED
from hiedit.evaluation.lifelong import StreamProbe
from hiedit.evaluation.results import MethodResult, Scores
from hiedit.experiment import Data, run_method
from hiedit.guard import Guard, GuardedRollout, settle
from hiedit.limits import MAX_DRIFT, MAX_KL, Moved
from hiedit.methods import build_method
from hiedit.rl.environment import Environment
from hiedit.runconfig import ModelConfig, RunConfig
from hiedit.types import IGNORE, EditBatch, EditRequest, Shift
from hiedit.watch import TOKENS, Watch

MODULES = ["model.layers.{0-1}.mlp.gate_proj", "model.layers.{0-1}.mlp.down_proj"]
OSLO, BONN = EditRequest("Oslo lies in", "Peru"), EditRequest("Bonn lies in", "Mali")
PROMPTS = ("Ink is", "Snow is", "Lima is in")
OPEN = Guard(max_kl=1e6, max_drift=1e6)
OFF = Guard(max_kl=None, max_drift=None)


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def backbone() -> Backbone:
    return Backbone(tiny_model("llama", num_hidden_layers=2), tiny_tokenizer(), MODULES)


def made(eta=0.1, target=0.5, **passes):
    method = MethodConfig(
        "test",
        SelectorConfig("all"),
        UpdaterConfig(eta=eta, solver="outer", step="unit"),
        passes=PassesConfig(**{"max": 20, "target_probability": target} | passes),
    )
    return build_method(backbone(), method)


def random_shifts(env: Environment, size: float, seed: int = 0) -> dict[str, Shift]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: Shift(
            torch.randn(1, m.in_features, generator=draw) * size,
            torch.randn(m.out_features, 1, generator=draw),
        )
        for name, m in env.backbone.modules.items()
    }


def weights(env) -> list[torch.Tensor]:
    return [m.weight.detach().clone() for m in env.backbone.modules.values()]


def same(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def forwards(env, monkeypatch) -> list[int]:
    """Grows by one with every forward pass of the model from now on."""
    calls, answers = [], type(env.backbone).answers

    def counted(self, batch):
        calls.append(len(batch))
        return answers(self, batch)

    monkeypatch.setattr(type(env.backbone), "answers", counted)
    return calls


def test_what_is_watched_is_small_and_always_the_same():
    env = Environment(backbone())
    watch, again = Watch(env, PROMPTS), Watch(env, PROMPTS)
    assert watch.measure() == again.measure() == Moved(0.0, 0.0, 0.0, 0.0)
    tokens = watch.tokens
    assert torch.equal(tokens.ids, again.tokens.ids)
    assert int(tokens.attention.sum()) <= TOKENS and len(tokens) > len(PROMPTS)
    rows = [
        row[kept.bool()].tolist() for row, kept in zip(tokens.ids, tokens.attention, strict=True)
    ]
    for prompt in PROMPTS:
        wanted = env.backbone.tokenizer(prompt).input_ids
        assert any(row[: len(wanted)] == wanted and len(row) > len(wanted) for row in rows)
    assert (tokens.labels != IGNORE).any(1).all()


def test_the_answers_are_the_models_own():
    env = Environment(backbone())
    watch = Watch(env, PROMPTS)
    watch.measure()
    answers = env.backbone.answers(watch.tokens)
    prompts = answers.row > 0  # the first one is a text that was drawn
    assert torch.equal(answers.logits.argmax(-1)[prompts], answers.target[prompts])


def test_the_reference_is_the_base_model_however_late_it_is_taken():
    env = Environment(backbone())
    early = Watch(env)
    early.measure()
    for seed in (0, 1):
        env.push(random_shifts(env, 0.05, seed))
        env.commit()
    late = Watch(env)
    assert late.measure().drift == pytest.approx(early.measure().drift, rel=1e-4)
    assert late.measure().kl == 0.0 < late.measure().drift
    env.reset()
    assert late.measure() == Moved(0.0, 0.0, 0.0, 0.0)


def test_one_forward_pass_an_edit(monkeypatch):
    env = Environment(backbone())
    watch = Watch(env)
    watch.measure()
    calls = forwards(env, monkeypatch)
    drift = []
    for seed in range(3):
        env.push(random_shifts(env, 0.05, seed))
        moved = watch.measure()
        assert moved.before == (drift[-1] if drift else 0.0) and moved.kl > 0
        drift.append(moved.drift)
        env.commit()
        watch.accept()
    assert len(calls) == 3
    env.state.reset()
    env.rewritten()  # somebody took edits out: the present model is asked anew
    watch.measure()
    assert len(calls) == 5


def test_a_shift_is_scaled_with_and_without_a_mask():
    env = Environment(backbone())
    plain = random_shifts(env, 0.1)
    masked = {n: Shift(s.A, s.B, torch.full((1,), 0.5)) for n, s in plain.items()}
    env.push(plain)
    env.push(masked)
    env.scale(0.5)
    for name, shift in env.trial().items():
        torch.testing.assert_close(shift.dense(), plain[name].dense() * 0.75)


@pytest.mark.parametrize(("kept", "size"), [(1, 0.5), (2, 0.25), (3, 1.0)])
def test_an_edit_is_made_smaller_where_it_still_holds(kept, size):
    """The bound lies between what the edit does at 1/2^kept of its size and at twice that; at an
    eighth this one no longer answers."""
    parts = made(eta=1.0)
    env, rollout = parts.rollout.env, parts.rollout
    outcome, watch = rollout.propose(EditBatch((OSLO,))), Watch(env)
    whole = env.pending
    found = []
    for _ in range(4):
        found.append(watch.measure())
        env.scale(0.5)
    env.pending = whole
    limit = (found[kept - 1].kl + found[kept].kl) / 2
    said = settle(env, watch, Guard(max_kl=limit, max_drift=None), outcome)
    assert said.scale == size
    for name, shift in env.trial().items():  # what is pending is what the verdict speaks of
        assert torch.equal(shift.dense(), said.outcome.shifts[name].dense())
        torch.testing.assert_close(shift.dense(), outcome.shifts[name].dense() * size)
    if size < 1:
        assert said.reasons == () and said.moved.kl == pytest.approx(found[kept].kl)
    else:
        assert said.moved == found[0]
        assert f"KL {found[0].kl:.4f}" in said.reasons[0] and "an eighth" in said.reasons[0]
        assert "does not hold" in said.reasons[0]


def test_a_huge_edit_is_rejected_with_the_figure_and_nothing_changes(tmp_path):
    with Editor(made(eta=5.0), tmp_path / "edits") as editor:
        base = weights(editor._env)
        (done,) = editor.apply([OSLO])
        assert done.status == REJECTED and done.id is None and done.kl > MAX_KL
        assert f"KL {done.kl:.4f} on watched prompts is above max_kl {MAX_KL:g}" in done.reasons[0]
        assert "eighth" in done.reasons[-1] or "does not hold" in done.reasons[-1]
        assert same(weights(editor._env), base) and editor.history() == []
        assert editor.drift == 0.0
    with Editor(made(eta=5.0), tmp_path / "off", OFF) as editor:
        (done,) = editor.apply([OSLO])
        assert done.status == COMMITTED and done.kl is None and done.drift is None
        assert editor.drift is None


def test_a_budget_that_is_used_up_says_so_and_can_be_had_back(tmp_path):
    with Editor(made(), tmp_path / "edits", OPEN) as editor:
        (first,) = editor.apply([OSLO])
        assert first.status == COMMITTED and first.kl == pytest.approx(first.drift)
    tight = Guard(max_kl=None, max_drift=first.drift * 1.0001)
    with Editor(made(), tmp_path / "edits", tight) as editor:
        base = weights(editor._env)
        (second,) = editor.apply([BONN])
        assert second.status == REJECTED, second
        (reason,) = second.reasons
        assert "the budget over all edits is used up" in reason and "--max-drift" in reason
        assert f"drift {first.drift:.4f}" in reason and "revert" in reason
        assert same(weights(editor._env), base)
        assert editor.drift == pytest.approx(first.drift, rel=1e-3)
        editor.revert(first.id)
        assert editor.drift is None  # not measured since
        (again,) = editor.apply([OSLO])
        assert again.status == COMMITTED
        assert editor.drift == again.drift == pytest.approx(first.drift, rel=1e-3)
        assert editor.history()[-1].report["drift"] == again.drift


def test_a_guarded_rollout_counts_what_it_keeps_out():
    parts = made(eta=5.0)
    guarded = GuardedRollout(parts.rollout, Guard())
    base = weights(guarded.env)
    outcome = guarded.step(EditBatch((OSLO,)))
    assert guarded.rejected == 1 and not outcome.shifts and not outcome.mask.any()
    assert same(weights(guarded.env), base) and not guarded.env.pending
    guarded.reset()
    assert guarded.rejected == 0
    free = GuardedRollout(parts.rollout, OPEN)
    assert free.step(EditBatch((OSLO,))).shifts and free.rejected == 0 and free.drift > MAX_KL


def test_what_is_not_finite_is_rejected_by_a_rollout_too(monkeypatch):
    guarded = GuardedRollout(made(undo=False, max=1).rollout, OFF)
    base = weights(guarded.env)
    broken = random_shifts(guarded.env, math.inf)
    monkeypatch.setattr(type(guarded.updater), "forward", lambda *_, **__: broken)
    guarded.step(EditBatch((OSLO,)))
    assert guarded.rejected == 1 and same(weights(guarded.env), base)


@pytest.mark.parametrize(("guard", "rejected"), [(True, 2), (False, None), (None, None)])
def test_a_lifelong_run_says_how_many_were_rejected(guard, rejected):
    parts = made(eta=5.0)
    env = parts.rollout.env
    probe = StreamProbe(env.backbone, (OSLO, BONN))
    evaluate = EvaluateConfig(points=1, examples=0, guard=guard)
    data = Data((), (OSLO, BONN), tuple((p, "x") for p in PROMPTS))
    result, *_ = run_method(env.backbone, data, probe, None, TrainConfig(), evaluate, ready=parts)
    assert result.rejected == rejected == result.row()["rejected"]


def test_runs_are_guarded_but_in_the_world():
    real = RunConfig(model=ModelConfig("x", "some/where"))
    assert real.measuring.guard and not RunConfig().measuring.guard
    chosen = dataclasses.replace(real, evaluate=EvaluateConfig(guard=False))
    assert not chosen.measuring.guard
    assert MethodResult("x", 0, 1, Scores()).row()["rejected"] is None


def test_bounds_as_the_command_line_gives_them():
    assert Guard().given(max_kl="none", max_drift="NONE") == OFF
    assert Guard().given(max_kl="0.25", max_drift=None) == Guard(max_kl=0.25)
    assert Guard() == Guard(max_kl=MAX_KL, max_drift=MAX_DRIFT) == Guard.of(world=False)
    assert Guard.of(world=True).max_kl > MAX_KL and Guard().watches and not OFF.watches
    with pytest.raises(ValueError, match="--max-drift='much'.*none"):
        Guard().given(max_drift="much")
    for name in ("max_kl", "max_drift", "max_local_kl"):
        with pytest.raises(ValueError, match=name):
            Guard(**{name: -1.0})


@pytest.mark.parametrize("moved", [Moved(math.nan, 0, 0, 0), Moved(0, math.inf, 0, 0)])
def test_answers_that_are_not_finite_break_every_bound(moved):
    assert "not finite" in Guard().broken(moved)[0]
