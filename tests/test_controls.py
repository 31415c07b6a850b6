"""Selectors for control, and training with estimators that score masks."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import pytest
import torch
from test_training import CONFIG, HIEDIT, PRESERVE, REQUESTS
from test_training import backbone as backbone  # a fixture
from test_training import base_model as base_model  # a fixture
from torch.testing import assert_close

from hiedit.backbone.losses import answer_nll
from hiedit.config import PassesConfig, SelectorConfig, TrainConfig
from hiedit.data.tokens import encode
from hiedit.methods import build_method, load_editor, record_choices, recorded_choices, save_editor
from hiedit.rl.effects import best_subset, subset_effects
from hiedit.rl.features import first_order_gain, gain_over_energy
from hiedit.types import EditBatch

TWO = [m for m in torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4) if m.sum() == 2]


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def build(backbone, selector, passes=HIEDIT.passes, **changes):
    method = dataclasses.replace(HIEDIT, selector=selector, passes=passes, **changes)
    return build_method(backbone, method, REQUESTS, PRESERVE, 0)


def masks_by_pass(method, request=REQUESTS[0], explore=False):
    """The executed mask of every pass of one edit."""
    rollout, found = method.rollout, []

    def on_pass(signals, action):
        found.append(action.mask[0].detach())
        with torch.no_grad():
            return rollout.updater(signals, action.mask)

    if explore:
        rollout.step(EditBatch((request,)), on_pass)
        return found
    push, names = rollout.env.push, rollout.updater.names

    def noted(shifts):
        found.append(torch.tensor([float(n in shifts) for n in names]))
        push(shifts)

    rollout.env.push = noted
    rollout.step(EditBatch((request,)))
    del rollout.env.push
    return found


MANY = PassesConfig(max=6, target_probability=1.0, undo=False)


def test_random_per_pass_draws_anew_and_random_per_edit_does_not(backbone):
    for anew in (True, False):
        method = build(backbone, SelectorConfig("random", k=2, every_pass=anew), MANY)
        masks = masks_by_pass(method)
        assert len(masks) == 6
        different = {tuple(m.tolist()) for m in masks}
        assert (len(different) > 1) == anew
        method.rollout.reset()


def signals_of(method, request=REQUESTS[0]):
    rollout = method.rollout
    tokens = rollout._encode(EditBatch((request,)))
    return rollout.env.probe(tokens, 1, rollout.updater.config.tokens).signals()


def test_gain_is_the_slope_of_the_loss_and_is_ranked_over_root_energy(backbone):
    method = build(backbone, SelectorConfig("gain", k=2))
    signals, updater, env = signals_of(method), method.rollout.updater, method.rollout.env
    with torch.no_grad():
        shifts = updater(signals, torch.ones(1, 4))
    gain = first_order_gain(signals, shifts, updater.names)[0]
    tokens, step = method.rollout._encode(EditBatch((REQUESTS[0],))), 1e-3
    for column, name in enumerate(updater.names):
        losses = []
        for sign in (1, -1):
            shift = dataclasses.replace(shifts[name], scale=torch.full_like(
                shifts[name].scale, sign * step))  # fmt: skip
            with env.with_shifts({name: shift}):
                losses.append(env.probe(tokens, 1, "all").loss[0])
        slope = (losses[1] - losses[0]) / (2 * step)
        assert_close(gain[column], slope, rtol=2e-2, atol=2e-3)
    score = gain / updater.energy(shifts).sqrt()
    assert_close(gain_over_energy(updater, signals)[0], score)
    mask = masks_by_pass(method)[0]
    assert set(mask.nonzero().squeeze(-1).tolist()) == set(score.topk(2).indices.tolist())


def test_best_subset_has_no_better_neighbour(backbone):
    method = build(backbone, SelectorConfig("best_subset", k=2, effect_edits=2))
    env, updater = method.rollout.env, method.rollout.updater
    effects = subset_effects(env, updater, REQUESTS[:2], torch.stack(TWO))
    found = best_subset(env, updater, REQUESTS[:2], 2, rounds=10)
    here = next(i for i, m in enumerate(TWO) if torch.equal(m, found))
    neighbours = [i for i, m in enumerate(TWO) if (m != found).sum() == 2]
    assert len(neighbours) == 4 and all(effects[here] >= effects[i] - 1e-5 for i in neighbours)
    assert torch.equal(method.rollout.selector.static_mask, found)
    assert effects.max() - effects.min() > 1e-3


def test_effects_of_a_subset_are_those_of_its_shifts_together(backbone):
    method = build(backbone, SelectorConfig("all"))
    env, updater = method.rollout.env, method.rollout.updater
    masks = torch.stack([torch.zeros(4), torch.ones(4)])
    nothing, everything = subset_effects(env, updater, REQUESTS[:1], masks, c_loc=0.0)
    assert abs(float(nothing)) < 1e-6
    signals = signals_of(method)
    with torch.no_grad():
        shifts = updater(signals, torch.ones(1, 4))
    rows = [(p, REQUESTS[0].target) for p in (REQUESTS[0].prompt, *REQUESTS[0].paraphrases)]
    tokens = encode(backbone.tokenizer, rows, padding_side="left")
    with torch.no_grad():
        fall = (
            answer_nll(env.answers(tokens)).mean() - answer_nll(env.answers(tokens, shifts)).mean()
        )
    assert_close(everything, fall, rtol=1e-4, atol=1e-5)


def test_shuffled_edits_with_the_mask_of_the_edit_before(backbone):
    shuffled = build(backbone, dataclasses.replace(HIEDIT.selector, kind="shuffled"))
    gate = shuffled.rollout.selector.gate
    with torch.no_grad():  # logits that depend on the edit
        gate.gate.weight.normal_(generator=torch.Generator().manual_seed(1))
        logits = torch.cat([gate(signals_of(shuffled, r), 1) for r in REQUESTS])
        gate.gate.bias.sub_(logits.mean(0))
    own = [shuffled.rollout.selector.mode(gate(signals_of(shuffled, r), 1)) for r in REQUESTS]
    assert len({tuple(m[0].tolist()) for m in own}) > 1
    first = shuffled.rollout.selector.mode(gate.gate.bias[None])
    selector = shuffled.rollout.selector
    for _ in range(2):  # the same again after a reset
        found = [selector(signals_of(shuffled, r)).mask for r in REQUESTS]
        for mask, wanted in zip(found, [first, *own], strict=False):
            assert torch.equal(mask, wanted)
        selector.reset()
    trained = selector(signals_of(shuffled, REQUESTS[1]), explore=True).mask
    assert torch.equal(trained.detach(), own[1]) and trained.requires_grad


def test_static_frequency_takes_what_a_trained_policy_chose(backbone, tmp_path):
    policy = build(backbone, HIEDIT.selector)
    save_editor(policy, tmp_path / "untrained")
    config = SelectorConfig("static_frequency", k=2, source=str(tmp_path / "untrained"))
    with pytest.raises(ValueError, match="selector.source=.*no recorded choices"):
        build(backbone, config)
    with pytest.raises(ValueError, match="holds no trained editor"):
        build(backbone, dataclasses.replace(config, source=str(tmp_path)))
    record_choices(policy, REQUESTS)
    save_editor(policy, tmp_path / "editor")
    own = torch.cat([policy.rollout.selector(signals_of(policy, r)).mask for r in REQUESTS])
    frequency = recorded_choices(tmp_path / "editor", backbone.names)
    assert_close(frequency, own.detach().mean(0))
    method = build(backbone, dataclasses.replace(config, source=str(tmp_path / "editor")))
    top = frequency.topk(2).indices
    assert bool((method.rollout.selector.static_mask[top] == 1).all())
    save_editor(method, tmp_path / "again")
    loaded = load_editor(backbone, tmp_path / "again")
    assert torch.equal(loaded.rollout.selector.static_mask, method.rollout.selector.static_mask)


# Training


ESTIMATORS = {
    "plackett-luce": {"estimator": "plackett_luce", "samples": 3, "entropy_floor": 0.5},
    "self-critical": {"estimator": "plackett_luce", "samples": 2, "baseline": "self_critical"},
    "bernoulli": {"estimator": "bernoulli", "samples": 3, "sparsity": 0.01},
    "regress": {"estimator": "counterfactual", "samples": 4},
    "rank": {"estimator": "counterfactual", "samples": 4, "credit": "rank"},
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_training_moves_the_gate_and_the_updater(backbone, name):
    selector = dataclasses.replace(HIEDIT.selector, **ESTIMATORS[name])
    method = build(backbone, selector)
    parts = (method.rollout.selector, method.rollout.updater)
    before = [[p.detach().clone() for p in part.parameters()] for part in parts]
    history = method.trainer(CONFIG, 0).run(REQUESTS, CONFIG, 0)
    assert len(history) == 6
    for part, old in zip(parts, before, strict=True):
        moved = [not torch.equal(p, o) for p, o in zip(part.parameters(), old, strict=True)]
        assert any(moved) and all(bool(p.isfinite().all()) for p in part.parameters())
    with pytest.raises(ValueError, match="train.n_edits=2.*straight_through"):
        method.trainer(TrainConfig(n_edits=2))


def test_training_executes_draws_and_editing_the_mode(backbone):
    selector = dataclasses.replace(
        HIEDIT.selector, estimator="plackett_luce", samples=2, init="zero"
    )
    method = build(backbone, selector, MANY)
    drawn = set()
    for _ in range(8):
        masks = masks_by_pass(method, explore=True)
        assert all(torch.equal(m, masks[0]) for m in masks)  # one option, one mask
        drawn.add(tuple(masks[0].tolist()))
        method.rollout.reset()
    assert len(drawn) > 2 and drawn <= {
        tuple(float(i in pair) for i in range(4)) for pair in combinations(range(4), 2)
    }
    selector = method.rollout.selector
    mode = selector.mode(selector.gate(signals_of(method), 1))[0]
    assert all(torch.equal(m, mode) for m in masks_by_pass(method))


def test_a_pass_that_does_not_suffice_costs(backbone):
    """The gate's gradient depends on c_pass where some masks hold at once and others do not."""
    found = []
    for c_pass in (0.0, 5.0):
        objective = dataclasses.replace(HIEDIT.objective, c_pass=c_pass)
        selector = dataclasses.replace(HIEDIT.selector, estimator="plackett_luce", samples=16)
        method = build(backbone, selector, objective=objective)
        trainer = method.trainer(CONFIG, 0)
        with torch.no_grad():
            method.rollout.selector.gate.gate.bias.zero_()
        signals = signals_of(method)
        lowest = float(signals.confidence[0])
        method.rollout.passes = PassesConfig(max=1, target_probability=min(1.0, lowest * 1.5))
        trainer.learner.edit_done = lambda: False
        for request in REQUESTS:
            trainer.edit(EditBatch((request,)))
            method.rollout.reset()
        gradient = method.rollout.selector.gate.gate.bias.grad.clone()
        found.append(gradient)
    assert not torch.allclose(found[0], found[1])


def test_phrasings_need_paraphrases_and_say_so(backbone):
    plain = [dataclasses.replace(r, paraphrases=()) for r in REQUESTS]
    bare = dataclasses.replace(
        HIEDIT, updater=dataclasses.replace(HIEDIT.updater, solver="protected", phrasing=0.0)
    )
    method = dataclasses.replace(bare, updater=dataclasses.replace(bare.updater, phrasing=1.0))
    with pytest.warns(UserWarning, match="no training edit has a paraphrase"):
        without = build_method(backbone, method, plain, PRESERVE, 0)
    having = build_method(backbone, method, REQUESTS, PRESERVE, 0)
    none = build_method(backbone, bare, REQUESTS, PRESERVE, 0)
    for one, two, three in zip(
        *(m.rollout.updater.groups for m in (without, having, none)), strict=True
    ):
        assert torch.equal(one.protection.precision, three.protection.precision)
        assert not torch.equal(two.protection.precision, three.protection.precision)
    with pytest.raises(ValueError, match="method.updater.phrasing=1.0.*solver=protected"):
        dataclasses.replace(method.updater, solver="outer")
