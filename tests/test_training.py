"""The learner, streams that grow, and training as a whole."""

import copy
import dataclasses
import math
from itertools import groupby

import pytest
import torch
from models import tiny_model, tiny_tokenizer
from torch.testing import assert_close

from hiedit.backbone.model import Backbone
from hiedit.config import (
    MethodConfig,
    ObjectiveConfig,
    PassesConfig,
    SelectorConfig,
    TrainConfig,
    UpdaterConfig,
)
from hiedit.methods import build_method
from hiedit.policy.selectors import Selector
from hiedit.rl.learner import Learner
from hiedit.rl.training import growing_streams
from hiedit.types import EditRequest, Locality
from hiedit.updaters.updater import Updater

PRESERVE = [("Rome lies in", "Italy"), ("Lima is in", "Peru"), ("Ink is", "blue")]
REQUESTS = tuple(
    EditRequest(
        f"{city} lies in",
        land,
        paraphrases=(f"{city} is in", f"Find {city} in"),
        locality=(Locality(f"{city} eats", "rice"), Locality(f"{city} has", "sun")),
    )
    for city, land in (("Oslo", "Peru"), ("Bonn", "Mali"), ("Kyiv", "Chad"), ("Suva", "Oman"))
)


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Models this small only wait for a second thread."""
    threads(1)


# The learner


def make_learner(every=1, clip=1.0, policy=True, kind="hypernetwork"):
    shapes, config = {(3, 2): ["a", "b"]}, UpdaterConfig(kind, "outer", lr=1e-3, lr_step=1e-2)
    selector = SelectorConfig("policy" if policy else "all", k=1, hidden=4, lr=1e-1)
    torch.manual_seed(0)
    updater = Updater(["a", "b"], shapes, config)
    return Learner(Selector(["a", "b"], shapes, selector), updater, clip, every), updater


def values_of(learner):
    return [p.detach().clone() for part in learner.parts for p in part]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def everything(learner):
    """A loss with gradient 1 at every learned number."""
    return sum(p.sum() for part in learner.parts for p in part)


def test_learner_steps_every_few_edits_on_the_summed_gradient():
    learner, updater = make_learner(every=3)
    before = values_of(learner)
    for edit in range(2):
        learner.backward(everything(learner))
        learner.backward(0.5 * everything(learner))  # two passes of one edit
        assert not learner.edit_done()
        assert_close(updater.groups[0].log_eta.grad, torch.full((2,), 1.5 * (edit + 1)))
    assert same(values_of(learner), before) and learner.version == 0
    assert learner.edit_done() and learner.version == 1 and not same(values_of(learner), before)
    assert all(p.grad is None for part in learner.parts for p in part)


def test_every_part_has_its_own_rate_and_clip():
    """Adam's first step is as long as the rate, however large the gradient of another part."""
    learner, updater = make_learner()
    net, steps, gate = learner.parts
    assert {id(p) for p in steps} == {id(updater.groups[0].log_eta), id(updater.groups[0].log_lam)}
    before = values_of(learner)
    learner.backward(everything(learner) + 1e6 * sum(p.sum() for p in gate))
    for part in learner.parts:
        assert sum(p.grad.square().sum() for p in part) > 1
    assert learner.edit_done()
    moved = iter(b - a for a, b in zip(values_of(learner), before, strict=True))
    for part, rate in ((net, 1e-3), (steps, 1e-2), (gate, 1e-1)):
        for parameter in part:
            assert_close(next(moved), torch.full_like(parameter, rate), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_learner_drops_what_is_not_finite(what):
    learner, _ = make_learner()
    before = values_of(learner)
    total = everything(learner)
    learner.backward(total * math.nan if what == "loss" else (0 * total).abs().sqrt())
    stepped = learner.edit_done()
    assert learner.dropped == 1 and same(values_of(learner), before)
    assert stepped == (what == "loss")
    learner.backward(everything(learner))
    assert learner.edit_done() and not same(values_of(learner), before)
    assert all(value.isfinite().all() for value in values_of(learner))


def test_nothing_to_learn_is_no_step():
    learner, _ = make_learner(policy=False, kind="closed_form")
    learner.backward(torch.tensor(1.0))
    assert learner.optimizer is None and not learner.edit_done() and learner.dropped == 0


# Streams


def stream_lengths(steps):
    return [sum(len(b) for _, b, _ in group) for _, group in groupby(steps, lambda s: s[0])]


@pytest.mark.parametrize("n_edits", [1, 3])
def test_streams_grow_and_the_last_length_repeats(n_edits):
    config = TrainConfig(edits=20, stream_lengths=[2, 4, 5], n_edits=n_edits)
    steps = list(growing_streams(REQUESTS, config, seed=0))
    assert stream_lengths(steps) == [2, 4, 5, 5, 4]  # the last is cut to 20 edits in all
    assert max(len(batch) for _, batch, _ in steps) == min(n_edits, 5)
    seen = 0
    for at, (stream, batch, begins) in enumerate(steps):
        assert begins == (at == 0 or steps[at - 1][0] != stream)
        assert batch.first == seen
        seen += len(batch)


def test_streams_draw_every_request_before_any_again():
    config = TrainConfig(edits=12, stream_lengths=[3])
    drawn = [b.requests[0].subject or b.requests[0].prompt for _, b, _ in
             growing_streams(REQUESTS, config, seed=0)]  # fmt: skip
    rounds = [drawn[i : i + 4] for i in range(0, 12, 4)]
    assert all(len(set(one)) == 4 for one in rounds) and len({tuple(one) for one in rounds}) > 1


def test_streams_are_seeded():
    config = TrainConfig(edits=12, stream_lengths=[3])
    first, again, other = (list(growing_streams(REQUESTS, config, seed=s)) for s in (1, 1, 2))
    assert first == again != other


def test_training_without_a_request_is_an_error():
    with pytest.raises(ValueError, match="no training edits"):
        next(growing_streams((), TrainConfig(edits=3), seed=0))
    assert list(growing_streams(REQUESTS, TrainConfig(edits=0), seed=0)) == []


# Training as a whole


@pytest.fixture(scope="module")
def base_model():
    model = tiny_model("llama", num_hidden_layers=2)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)  # so that it can be sure of something
    return model


@pytest.fixture
def backbone(base_model):
    modules = ["model.layers.{0-1}.mlp.gate_proj", "model.layers.{0-1}.mlp.down_proj"]
    return Backbone(copy.deepcopy(base_model), tiny_tokenizer(), modules)


def bits(backbone):
    return [p.detach().clone().view(torch.int32) for p in backbone.model.parameters()]


HIEDIT = MethodConfig(
    "test",
    SelectorConfig("policy", k=2, hidden=8, init="effects", effect_edits=2, lr=1e-2),
    UpdaterConfig("hypernetwork", rank=8, per_module=True, eta=0.1, lr=3e-3, lr_step=3e-2),
    ObjectiveConfig("trajectory", back_depth=2, rho=0.1),
    PassesConfig(max=2),
)
CONFIG = TrainConfig(edits=6, stream_lengths=[2, 3], steps_per_update=2)


def prepare(backbone, seed=0, config=CONFIG, method=HIEDIT):
    parts = build_method(backbone, method, REQUESTS, PRESERVE, seed)
    return parts, parts.trainer(config, seed)


def state_of(parts):
    both = (parts.rollout.updater, parts.rollout.selector)
    return {k: v.clone() for module in both for k, v in module.named_parameters()}


def test_training_changes_every_part_and_leaves_the_model_unedited(backbone):
    before = bits(backbone)
    parts, trainer = prepare(backbone)
    start, told = state_of(parts), []
    history = trainer.run(REQUESTS, CONFIG, 0, told.append)
    assert history == told and [step.edit for step in history] == [1, 2, 3, 4, 5, 6]
    assert [step.stream for step in history] == [0, 0, 1, 1, 1, 2]
    assert trainer.learner.version == 3 and trainer.learner.dropped == 0
    assert all(1 <= step.layers <= 4 and 1 <= step.passes <= 2 for step in history)
    assert all(math.isfinite(step.loss) for step in history)
    still = [name for name, value in state_of(parts).items() if torch.equal(value, start[name])]
    assert still == []
    assert same(bits(backbone), before)
    assert not any(p.requires_grad or p.grad is not None for p in backbone.model.parameters())
    assert not any(module._forward_hooks for module in backbone.model.modules())


@pytest.mark.parametrize("where", ["after-a-step", "within-a-pass"])
def test_error_in_training_leaves_the_model_unedited(backbone, where, monkeypatch):
    before = bits(backbone)
    parts, trainer = prepare(backbone)
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) == 3:
            edited = not same(bits(backbone), before)
            raise RuntimeError(f"stop, {edited=}")

    if where == "within-a-pass":
        monkeypatch.setattr(trainer.learner, "backward", fail)
    on_step = fail if where == "after-a-step" else lambda step: None
    with pytest.raises(RuntimeError, match="stop, edited=True"):
        trainer.run(REQUESTS, TrainConfig(edits=9, stream_lengths=[9]), 0, on_step)
    assert same(bits(backbone), before) and parts.rollout.env.pending == []
    assert not any(module._forward_hooks for module in backbone.model.modules())


def test_training_is_deterministic(backbone):
    def run(seed):
        parts, trainer = prepare(backbone, seed)
        history = trainer.run(REQUESTS, CONFIG, seed)
        history = [dataclasses.replace(step, seconds=0.0) for step in history]
        return history, list(state_of(parts).values())

    (first, state), (again, same_state), (other, _) = run(0), run(0), run(1)
    assert first == again and same(state, same_state)
    assert first != other


def test_training_lowers_the_loss(backbone):
    method = dataclasses.replace(HIEDIT, passes=PassesConfig(max=1))
    config = TrainConfig(edits=48, stream_lengths=[4])
    _, trainer = prepare(backbone, config=config, method=method)
    history = [step.loss for step in trainer.run(REQUESTS, config, 0)]
    first, last = sum(history[:8]) / 8, sum(history[-8:]) / 8
    assert last < 0.8 * first


def test_training_stops_at_its_time_limit(backbone):
    config = TrainConfig(edits=1000, stream_lengths=[9], max_seconds=1e-6)
    _, trainer = prepare(backbone)
    assert len(trainer.run(REQUESTS, config, 0)) == 1


@pytest.mark.parametrize("kind", ["all", "random", "static"])
def test_other_selectors_train_the_hypernetwork_alone(backbone, kind):
    method = dataclasses.replace(HIEDIT, selector=SelectorConfig(kind, k=2, effect_edits=1))
    parts, trainer = prepare(backbone, method=method)
    start = state_of(parts)
    trainer.run(REQUESTS, TrainConfig(edits=2, stream_lengths=[2]), 0)
    assert not same(state_of(parts).values(), start.values())
    assert not list(parts.rollout.selector.parameters())
