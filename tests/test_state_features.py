"""What a policy is told of the modules' state: each feature against its definition, the gate that
sees them, and that they survive saving, training in segments and resuming."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_controls import signals_of
from test_training import CONFIG, HIEDIT, PRESERVE, REQUESTS
from test_training import backbone as backbone  # a fixture
from test_training import base_model as base_model  # a fixture
from torch.testing import assert_close

from hiedit.config import FEATURES, MethodConfig, SelectorConfig
from hiedit.methods import build_method, load_editor, save_editor
from hiedit.policy.selectors import top_k_mask
from hiedit.rl.checkpoint import Checkpoints
from hiedit.rl.features import StateFeatures, first_order_gain, gain_over_energy
from hiedit.types import EditBatch


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def told(*features, **changes) -> MethodConfig:
    updater = dataclasses.replace(HIEDIT.updater, solver="protected")
    selector = dataclasses.replace(HIEDIT.selector, features=list(features), **changes)
    return dataclasses.replace(HIEDIT, selector=selector, updater=updater)


def built(backbone, *features, seed=0, **changes):
    return build_method(backbone, told(*features, **changes), REQUESTS, PRESERVE, seed)


def test_fullness_is_what_earlier_edits_added(backbone):
    rollout = built(backbone, "fullness").rollout
    signals = signals_of(built(backbone, "fullness"))
    empty = rollout.told(signals).state
    assert empty.shape == (1, 4, 1) and not empty.any()
    before = {n: m.weight.clone() for n, m in backbone.modules.items()}
    for i, request in enumerate(REQUESTS[:3]):
        rollout.step(EditBatch((request,), i))
    found = rollout.told(signals).state[0, :, 0]
    for column, name in enumerate(backbone.names):
        change = (backbone.modules[name].weight - before[name]).norm() / before[name].norm()
        assert_close(found[column], change, rtol=1e-4, atol=1e-7)
    assert (found > 0).any()
    rollout.reset()
    assert not rollout.told(signals).state.any()


def test_collision_is_in_the_units_of_the_precision(backbone):
    method = built(backbone, "collision")
    rollout, signals = method.rollout, signals_of(method)
    found = rollout.told(signals).state[0, :, 0]
    for group in rollout.updater.groups:
        for m, name in enumerate(group.names):
            p, keys = group.protection.precision[m], signals.keys[name]
            share = torch.stack([k @ p @ k / (k @ k) for k in keys]) * group.protection.eps
            assert_close(found[backbone.names.index(name)], 1 - share.mean(), rtol=1e-4, atol=1e-5)
            direction = torch.linalg.eigh(p.double()).eigenvectors[:, [0, -1]].T.float()[None]
            worst, free = group.protection.collision(direction.expand(len(group.names), -1, -1))[m]
            assert worst > free and free < 1e-3  # three sentences leave most directions free
    rollout.step(EditBatch((REQUESTS[0],), 0))
    mask = rollout.propose(EditBatch((REQUESTS[1],), 1)).mask
    assert mask.any()
    after = rollout.told(signals).state[0, :, 0]
    assert (after >= found - 1e-6).all() and (after > found).any()  # its own keys are protected now
    rollout.env.drop()
    rollout.reset()


def test_gain_and_cost_are_those_of_the_whole_shift(backbone):
    method = built(backbone, "cost", "gain")
    rollout, signals = method.rollout, signals_of(method)
    state = rollout.told(signals).state[0]
    with torch.no_grad():
        shifts = rollout.updater(signals, torch.ones(1, 4))
        gain = first_order_gain(signals, shifts, backbone.names)[0]
    assert_close(state[:, 0], rollout.updater.energy(shifts).log())  # in the order asked for
    assert_close(state[:, 1], gain.clamp(min=1e-12).log())


def test_a_policy_starts_with_the_same_choices_with_and_without(backbone):
    with_, without = built(backbone, *FEATURES), built(backbone)
    signals = signals_of(without)
    one = with_.rollout.selector(with_.rollout.told(signals))
    two = without.rollout.selector(without.rollout.told(signals))
    assert torch.equal(one.logits, two.logits) and torch.equal(one.mask, two.mask)
    assert without.rollout.told(signals) is signals


@pytest.mark.parametrize("estimator", ["straight_through", "counterfactual"])
def test_a_policy_may_start_from_gain_over_root_energy(backbone, estimator):
    """Its first choices are those of ``kind: gain``, its logits that ratio's log."""
    changes = {"init": "gain", "estimator": estimator, "credit": "rank"}
    rollout = built(backbone, "collision", "cost", "gain", **changes).rollout
    gate = rollout.selector.gate
    with torch.no_grad():
        gate.gate.weight.zero_()
    for request in REQUESTS:
        signals = rollout.told(signals_of(built(backbone), request))
        ratio = gain_over_energy(rollout.updater, signals)
        action = rollout.selector(signals)
        assert torch.equal(action.mask, top_k_mask(ratio, rollout.selector.k))
        some = ratio > 1e-3
        assert some.any()
        assert_close(action.logits[some], ratio[some].log(), rtol=1e-3, atol=1e-3)
    state = signals.state.clone()
    best = int(action.logits.argmax())
    state[0, best, 2] = torch.nan
    broken = rollout.selector(dataclasses.replace(signals, state=state))
    assert not broken.mask[0, best] and broken.logits.isfinite().all()


def test_the_gates_gradient_is_that_of_finite_differences(backbone):
    method = built(backbone, *FEATURES)
    gate = method.rollout.selector.gate
    for request in REQUESTS:
        gate.observe(method.rollout.told(signals_of(method, request)))
    gate.double()
    signals = method.rollout.told(signals_of(method))
    double = {n: k.double() for n, k in signals.keys.items()}
    grads = {n: g.double() for n, g in signals.grads.items()}
    signals = dataclasses.replace(signals, keys=double, grads=grads, state=signals.state.double())
    weight = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (gate(signals, 1) * weight).sum().backward()
    for parameter in (gate.own, gate.others):
        assert parameter.grad.abs().max() > 1e-3
        flat, index = parameter.data.view(-1), int(parameter.grad.abs().argmax())
        values = []
        for sign in (1, -1):
            flat[index] += sign * 1e-5
            with torch.no_grad():
                values.append(float((gate(signals, 1) * weight).sum()))
            flat[index] -= sign * 1e-5
        slope = (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx(float(parameter.grad.view(-1)[index]), rel=1e-6)


def test_a_module_that_is_not_finite_does_not_decide_for_the_others(backbone):
    method = built(backbone, *FEATURES)
    signals = method.rollout.told(signals_of(method))
    state = signals.state.clone()
    state[0, 0, 2] = torch.nan
    gate = method.rollout.selector.gate
    with torch.no_grad():
        gate.own.fill_(0.3)
        gate.others.normal_()
    assert gate(dataclasses.replace(signals, state=state), 1).isfinite().all()


def test_training_moves_their_weights_and_a_resumed_run_has_the_same_bits(backbone, tmp_path):
    def parts():
        method = built(backbone, *FEATURES)
        return method, method.trainer(CONFIG, 0)

    whole, trainer = parts()
    trainer.run(REQUESTS, CONFIG, 0)
    gate = whole.rollout.selector.gate
    assert gate.own.abs().max() > 0 and gate.others.abs().max() > 0
    assert float(gate.state_norm.count) > 0
    wanted = {n: v.clone() for n, v in whole.rollout.selector.state_dict().items()}

    class Died(Exception):
        pass

    def die(step):
        if step.edit == 4:
            raise Died

    def kept(resume=False):
        return Checkpoints(tmp_path / "checkpoints", every=1, keep=2, identity={}, resume=resume)

    half, trainer = parts()
    with pytest.raises(Died):
        trainer.run(REQUESTS, CONFIG, 0, die, kept())
    again, trainer = parts()
    trainer.run(REQUESTS, CONFIG, 0, lambda step: None, kept(resume=True))
    found = again.rollout.selector.state_dict()
    assert all(torch.equal(found[n], v) for n, v in wanted.items())

    save_editor(again, tmp_path / "editor")
    again.rollout.reset()
    loaded = load_editor(backbone, tmp_path / "editor")
    signals = signals_of(loaded)
    one, two = (m.rollout.selector(m.rollout.told(signals)) for m in (again, loaded))
    assert torch.equal(one.logits, two.logits)


@pytest.mark.parametrize(
    "message, change",
    [
        ("features='fulness'.*did you mean 'fullness'", lambda: told("fulness")),
        ("each once", lambda: told("gain", "gain")),
        ("init='gain'.*add 'gain' and 'cost'", lambda: told("gain", init="gain")),
        ("only for a policy.*kind='random'", lambda: SelectorConfig("random", features=["gain"])),
        (
            "'collision' is with protected keys",
            lambda: dataclasses.replace(
                told("collision"), updater=dataclasses.replace(HIEDIT.updater, solver="outer")
            ),
        ),
    ],
)
def test_mistakes(message, change):
    with pytest.raises(ValueError, match=message):
        change()


def test_fullness_looks_at_the_weights_once_a_commit(backbone, monkeypatch):
    rollout = built(backbone, "fullness").rollout
    seen = []
    share = StateFeatures._share
    monkeypatch.setattr(StateFeatures, "_share", lambda *a: seen.append(a[1]) or share(*a))
    signals = signals_of(built(backbone, "fullness"))
    for _ in range(3):
        rollout.told(signals)
    assert len(seen) == 4
    rollout.step(EditBatch((REQUESTS[0],), 0))
    rollout.told(signals)
    assert len(seen) == 8
    rollout.reset()
