"""Credit of the whole option: every drawn mask is edited by, as far as it goes, and then scored."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from models import tiny_tokenizer
from test_training import HIEDIT, PRESERVE, REQUESTS
from test_training import base_model as base_model  # a fixture
from torch.testing import assert_close

from hiedit.backbone.losses import answer_confidence
from hiedit.backbone.model import Backbone
from hiedit.config import ObjectiveConfig, SelectorConfig
from hiedit.methods import build_method
from hiedit.policy import estimators
from hiedit.policy.selectors import Selector
from hiedit.rl import segment
from hiedit.rl.learner import Gradients
from hiedit.rl.objective import Objective
from hiedit.rl.options import score_options
from hiedit.types import EditBatch

COSTS = ObjectiveConfig("trajectory", back_depth=2, rho=0.1, c_reg=1e-3, c_pass=0.3)
MODULES = ["model.layers.{0-1}.mlp.gate_proj", "model.layers.{0-1}.mlp.down_proj"]
POLICY = SelectorConfig(
    "policy", k=1, estimator="counterfactual", credit="rank", credit_over="option", hidden=8
)
PASSES = dataclasses.replace(HIEDIT.passes, max=3, target_probability=0.9)
METHOD = dataclasses.replace(HIEDIT, selector=POLICY, objective=COSTS, passes=PASSES)
STEP = EditBatch((REQUESTS[2],), 2)


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def begun(base_model, method=METHOD):
    """(rollout, objective) after two edits, the same each time."""
    backbone = Backbone(copy.deepcopy(base_model), tiny_tokenizer(), MODULES)
    rollout = build_method(backbone, method, REQUESTS, PRESERVE, 0).rollout
    objective = Objective(method.objective, backbone.tokenizer, 0)
    for step in range(2):
        rollout.step(EditBatch((REQUESTS[step],), step))
        objective.remember(EditBatch((REQUESTS[step],), step))
    return rollout, objective


def fixed(base_model, module):
    """The reward's loss once the edit was committed in one module by the usual loop, its price of
    passes, and how many there were."""
    rollout, objective = begun(base_model)
    batch = objective.batch(STEP, "cpu")
    reference = objective.reference(rollout.env, batch)
    names = rollout.updater.names
    chosen = SelectorConfig("static", k=1, modules=[names[module]])
    rollout.selector = Selector(names, {}, chosen)

    def hook(signals, action):
        with torch.no_grad():
            return rollout.updater(signals, action.mask)

    outcome = rollout.step(STEP, hook)
    with torch.no_grad():
        energy = rollout.updater.energy(outcome.shifts)
        loss = objective(rollout.env, batch, reference, {}, energy).loss
        norm = sum(((s.B * s.scale) @ s.A).square().sum() for s in outcome.shifts.values())
        own = rollout.env.answers(batch.tokens).take(0, 1)
    holds = float(answer_confidence(own)[0]) > PASSES.target_probability
    late = max(0, outcome.passes - 1) + (not holds)
    return float(loss + COSTS.c_reg * norm + COSTS.c_pass * late), outcome.passes


def test_an_option_is_scored_as_if_it_had_been_taken(base_model):
    rollout, objective = begun(base_model)
    batch = objective.batch(STEP, "cpu")
    reference = objective.reference(rollout.env, batch)
    env = rollout.env
    weights = {n: m.weight.clone() for n, m in env.backbone.modules.items()}
    statistics = {n: t.clone() for n, t in rollout.updater.state_dict().items()}
    found = score_options(rollout, COSTS, STEP, batch, reference, torch.eye(4))
    wanted = [fixed(base_model, module) for module in range(4)]
    assert_close(found, torch.tensor([loss for loss, _ in wanted]), rtol=1e-4, atol=1e-4)
    assert max(passes for _, passes in wanted) > 1 and found.std() > 0.01
    assert not env.pending  # and nothing else is left of it
    assert all(torch.equal(m.weight, weights[n]) for n, m in env.backbone.modules.items())
    assert all(torch.equal(t, statistics[n]) for n, t in rollout.updater.state_dict().items())


def test_an_edit_is_credited_once_however_many_passes_it_takes(base_model, monkeypatch):
    rollout, objective = begun(base_model)
    gradients, calls = Gradients(rollout.selector, rollout.updater), []

    def counted(*given):
        calls.append(given[-1])
        return score_options(*given)

    monkeypatch.setattr(segment, "score_options", counted)
    done = segment.train_edit(rollout, objective, gradients.backward, STEP)
    assert done.passes > 1 and len(calls) == 1
    assert torch.equal(calls[0], torch.eye(4))  # all masks, where there are no more than samples
    taken, dropped = gradients.take()
    assert dropped == 0 and taken["selector.gate.gate.bias"].abs().sum() > 0


def test_its_gradient_is_that_of_the_ranking_of_the_options(base_model):
    rollout, objective = begun(base_model)
    seen = []

    def hook(signals, action):
        seen.append(rollout.selector.loss(action, losses))
        return {}

    batch = objective.batch(STEP, "cpu")
    reference = objective.reference(rollout.env, batch)
    losses = score_options(rollout, COSTS, STEP, batch, reference, torch.eye(4))
    rollout.propose(STEP, hook)
    seen[0].backward()
    wanted = rollout.selector.gate.gate.bias.grad.clone()

    rollout, objective = begun(base_model)
    gradients = Gradients(rollout.selector, rollout.updater)
    segment.train_edit(rollout, objective, gradients.backward, STEP)
    assert_close(gradients.take()[0]["selector.gate.gate.bias"], wanted, rtol=1e-3, atol=1e-6)


def test_every_subset_is_drawn_where_there_are_few(base_model):
    draws = estimators.every_subset(4, 2, edits=1)
    masks = {tuple(m) for m in estimators.masks_of(draws)[:, 0].int().tolist()}
    assert len(masks) == len(draws) == 6 and all(sum(m) == 2 for m in masks)
    assert draws.max() == 2


def test_energy_has_no_say_where_size_is_kept_out_of_the_gate(base_model):
    apart = dataclasses.replace(METHOD, selector=dataclasses.replace(POLICY, size_in_gate=False))
    free = dataclasses.replace(COSTS, rho=0.0, c_reg=0.0)
    found = []
    for method, costs in ((METHOD, COSTS), (METHOD, free), (apart, COSTS)):
        rollout, objective = begun(base_model, method)
        batch = objective.batch(STEP, "cpu")
        reference = objective.reference(rollout.env, batch)
        found.append(score_options(rollout, costs, STEP, batch, reference, torch.eye(4)))
    counted, weightless, kept_out = found
    assert torch.equal(kept_out, weightless)
    assert bool((counted > kept_out).all())
