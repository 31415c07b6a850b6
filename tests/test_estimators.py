"""Estimators of the policy's gradient against exact enumeration on four modules of a tiny model,
where the loss of each of the 16 masks is the true objective."""

from __future__ import annotations

import copy
import dataclasses
from itertools import permutations, product

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
from hiedit.rl.candidates import score_masks
from hiedit.rl.objective import Objective
from hiedit.types import Action, EditBatch, Shift, Signals

ALL = torch.tensor(list(product((0.0, 1.0), repeat=4)))
CODE = torch.tensor([8, 4, 2, 1])
LOGITS = torch.tensor([[0.4, -0.3, 0.9, -0.6]], dtype=torch.float64)
COSTS = ObjectiveConfig("trajectory", back_depth=2, rho=0.1, c_reg=1e-3, c_pass=0.3)


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.fixture(scope="module")
def measured(base_model):
    """(loss of every mask by ``score_masks``, the same with dense weights, one by one)."""
    modules = ["model.layers.{0-1}.mlp.gate_proj", "model.layers.{0-1}.mlp.down_proj"]
    backbone = Backbone(copy.deepcopy(base_model), tiny_tokenizer(), modules)
    method = dataclasses.replace(HIEDIT, selector=SelectorConfig("all"), objective=COSTS)
    rollout = build_method(backbone, method, REQUESTS, PRESERVE, 0).rollout
    env, updater = rollout.env, rollout.updater
    objective = Objective(COSTS, backbone.tokenizer, 0)
    for step in range(2):  # a past to look at
        rollout.step(EditBatch((REQUESTS[step],), step))
        objective.remember(EditBatch((REQUESTS[step],), step))
    batch = objective.batch(EditBatch((REQUESTS[2],), 2), "cpu")
    reference = objective.reference(env, batch)
    tokens = rollout._encode(EditBatch((REQUESTS[2],)))
    signals = env.probe(tokens, 1, updater.config.tokens).signals()
    with torch.no_grad():
        full = updater(signals, torch.ones(1, 4))
    assert len(full) == 4
    with torch.no_grad():
        lowest = env.answers(batch.tokens, {}).take(0, 1)
    target = float(answer_confidence(lowest)[0]) * 1.5
    found = score_masks(env, updater, COSTS, batch, reference, full, ALL, target)
    one_by_one = []
    for mask in ALL:
        shifts = {
            n: Shift(s.A, s.B, s.scale * m) for (n, s), m in zip(full.items(), mask, strict=True)
        }
        with torch.no_grad():
            reward = objective(env, batch, reference, shifts, updater.energy(shifts))
            holds = answer_confidence(env.answers(batch.tokens, shifts).take(0, 1))[0] > target
        one_by_one.append(float(reward.loss) + COSTS.c_pass * (not bool(holds)))
    return found.double(), torch.tensor(one_by_one, dtype=torch.float64)


def test_one_batch_scores_every_mask_as_one_by_one(measured):
    found, one_by_one = measured
    assert_close(found, one_by_one, rtol=1e-4, atol=1e-4)
    assert found.std() > 0.05  # or the tests below would compare nothing with nothing


# Exact gradients


def plackett_luce_orders(k=2):
    """Draws [P, 1, 4] of every order of ``k`` of four modules."""
    orders = list(permutations(range(4), k))
    draws = torch.zeros(len(orders), 1, 4, dtype=torch.int64)
    for row, order in enumerate(orders):
        for place, module in enumerate(order, start=1):
            draws[row, 0, module] = place
    return draws


def loss_of(draws, losses):
    return losses[((draws[:, 0] > 0).long() * CODE).sum(-1)]


def exact(estimator, losses, sparsity=0.0, logits=LOGITS):
    """Gradient of the expected loss, by summing over all that can be drawn; written out with plain
    probabilities, apart from the estimators' own log-probabilities."""
    z = logits.clone().requires_grad_()
    if estimator == "bernoulli":
        p = z.sigmoid()[0]
        weight = (ALL.double() * p + (1 - ALL.double()) * (1 - p)).prod(-1)
        expected = (weight * (losses + sparsity * ALL.double().sum(-1))).sum()
    else:
        expected = torch.zeros((), dtype=torch.float64)
        for i, j in permutations(range(4), 2):
            e = z[0].exp()
            p = e[i] / e.sum() * e[j] / (e.sum() - e[i])
            expected = expected + p * losses[int(CODE[i] + CODE[j])]
    return torch.autograd.grad(expected, z)[0]


def estimates(estimator, losses, rounds, logits=LOGITS, **config):
    """[rounds, 4]: the gradients that the selector's own loss gives, each from its own draws."""
    names = list("abcd")
    settings = SelectorConfig("policy", k=2, estimator=estimator, hidden=2, **config)
    selector = Selector(names, {(2, 2): names}, settings, seed=5)
    found = []
    for _ in range(rounds):
        z = logits.clone().requires_grad_()
        action = selector._explore(z)
        mode = None
        if settings.baseline == "self_critical":
            mode = losses[int((selector.mode(z)[0].long() * CODE).sum())]
        selector.loss(action, loss_of(action.draws, losses), mode).backward()
        found.append(z.grad[0])
    return torch.stack(found)


def agrees(found, wanted, errors=4.0):
    standard = found.std(0) / len(found) ** 0.5
    return bool(((found.mean(0) - wanted).abs() <= errors * standard + 1e-9).all())


CASES = [
    ("plackett_luce", {"baseline": "leave_one_out", "samples": 4}),
    ("plackett_luce", {"baseline": "self_critical", "samples": 2}),
    ("bernoulli", {"baseline": "leave_one_out", "samples": 4, "sparsity": 0.1}),
    ("bernoulli", {"baseline": "self_critical", "samples": 1, "sparsity": 0.1}),
]


@pytest.mark.parametrize(("estimator", "config"), CASES, ids=lambda c: str(c))
def test_the_expected_gradient_is_that_of_the_true_objective(measured, estimator, config):
    """Within 4 standard errors of the mean of 500 estimates (seeded); a bound this tight sees an
    estimator that is wrong: two of them below do not pass."""
    losses = measured[0]
    found = estimates(estimator, losses, 500, **config)
    wanted = exact(estimator, losses, config.get("sparsity", 0.0))[0]
    assert agrees(found, wanted), (found.mean(0), wanted)
    assert not agrees(found, -wanted) and not agrees(found, 0 * wanted)


def test_mutants_do_not_agree(measured, monkeypatch):
    """Inclusion treated as independent, and the baseline's factor S/(S-1) left out."""
    losses = measured[0]
    wanted = exact("plackett_luce", losses)[0]
    with monkeypatch.context() as patch:
        patch.setattr(estimators, "plackett_luce_log_prob", estimators.bernoulli_log_prob)
        assert not agrees(estimates("plackett_luce", losses, 500, samples=4), wanted)
    with monkeypatch.context() as patch:
        patch.setattr(estimators, "disadvantage", lambda x, *_: x - x.mean())
        assert not agrees(estimates("plackett_luce", losses, 500, samples=2), wanted)


def test_counterfactual_regression_is_that_over_all_subsets(measured):
    losses = measured[0]
    found = estimates("counterfactual", losses, 500, samples=4)
    z = LOGITS.clone().requires_grad_()
    masks = ALL.double()[ALL.sum(-1) == 2]
    residual = (masks * z).sum(-1) + losses[ALL.sum(-1) == 2]
    (0.5 * residual.var(correction=0)).backward()
    assert agrees(found, z.grad[0]), (found.mean(0), z.grad)
    assert not agrees(found, 0 * z.grad[0])


def test_ranking_puts_the_better_masks_first(measured):
    losses = measured[0]
    draws = plackett_luce_orders()
    z = torch.zeros_like(LOGITS, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        estimators.ranking_loss(z, draws, loss_of(draws, losses)).backward()
        optimizer.step()
    value = (estimators.masks_of(draws) * z.detach()).sum((-2, -1))
    right = loss_of(draws, losses)
    agree = ((value[:, None] - value) * (right[:, None] - right) < 0)[right[:, None] != right]
    assert agree.float().mean() > 0.8


# Distributions


def test_plackett_luce_probabilities_sum_to_one_and_are_drawn():
    draws = plackett_luce_orders()
    p = estimators.plackett_luce_log_prob(LOGITS, draws).exp()
    assert_close(p.sum(), torch.ones((), dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    many = estimators.draw_plackett_luce(LOGITS, 2, 20000, generator)
    share = (many[:, None] == draws[None]).all(-1).all(-1).double().mean(0)
    assert bool(((share - p).abs() < 4 * (p * (1 - p) / 20000).sqrt()).all())


def test_bernoulli_is_drawn_with_its_probabilities():
    generator = torch.Generator().manual_seed(0)
    draws = estimators.draw_bernoulli(LOGITS, 20000, generator)
    p = LOGITS.sigmoid()[0]
    share = draws[:, 0].double().mean(0)
    assert bool(((share - p).abs() < 4 * (p * (1 - p) / 20000).sqrt()).all())


def test_an_edit_that_takes_no_part_has_no_gradient():
    z = LOGITS.repeat(2, 1).requires_grad_()
    for draw, log_prob in (
        (estimators.draw_plackett_luce(z, 2, 3), estimators.plackett_luce_log_prob),
        (estimators.draw_bernoulli(z, 3), estimators.bernoulli_log_prob),
    ):
        draw[:, 1] = -1
        (grad,) = torch.autograd.grad(log_prob(z, draw).sum(), z)
        assert not bool(grad[1].any()) and bool(grad[0].any()) and bool(grad.isfinite().all())


@pytest.mark.parametrize("k", [2, None], ids=["plackett-luce", "bernoulli"])
def test_the_entropy_floor_stops_a_collapse(k):
    even, sure = torch.zeros(1, 4), torch.tensor([[9.0, 9.0, -9.0, -9.0]])
    assert_close(estimators.entropy(even, k), torch.ones(1), atol=1e-3, rtol=0)
    assert estimators.entropy(sure, k) < 0.01
    assert estimators.entropy_floor_loss(even, k, 0.5) == 0
    z = (sure / 3).requires_grad_()
    estimators.entropy_floor_loss(z, k, 0.5).backward()
    assert bool((z.grad * sure > 0).all())  # descending it brings every logit back


def test_a_broken_mask_counts_as_the_worst():
    losses = torch.tensor([1.0, torch.nan, 3.0, torch.inf])
    assert torch.equal(estimators.sound_losses(losses), torch.tensor([1.0, 3, 3, 3]))
    assert not bool(estimators.sound_losses(losses[1:2]).any())


def test_draws_of_an_option_stay_those_of_its_first_pass():
    action = Action(torch.ones(1, 4), LOGITS, plackett_luce_orders())
    names = list("abcd")
    config = SelectorConfig("policy", k=2, estimator="plackett_luce", hidden=2)
    selector = Selector(names, {(2, 2): names}, config)
    rows = {n: torch.randn(3, 2) for n in names}
    signals = Signals(rows, rows, torch.zeros(3, dtype=torch.int64), torch.ones(1), torch.zeros(1))
    later = selector.again(signals, action)
    assert later.draws is action.draws and later.mask is action.mask and later.logits.requires_grad
