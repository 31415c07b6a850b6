"""Segments of a trajectory: what they carry, their state, and observations that travel."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from models import tiny_tokenizer
from test_training import CONFIG, HIEDIT, PRESERVE, REQUESTS
from test_training import backbone as backbone  # a fixture
from test_training import base_model as base_model  # a fixture
from torch import nn

from hiedit.backbone.model import Backbone
from hiedit.backbone.normalise import RunningNorm
from hiedit.config import ObjectiveConfig, SelectorConfig
from hiedit.methods import build_method
from hiedit.rl.checkpoint import Snapshot
from hiedit.rl.learner import Contribution, Gradients, Learner
from hiedit.rl.objective import Objective
from hiedit.rl.observed import learned_state, load_learned_state, recorded, replay
from hiedit.rl.segment import Trajectory

SEED = 3


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def make(backbone, method=HIEDIT, config=CONFIG):
    """(trajectory, what takes its gradients) of a new method."""
    parts = build_method(backbone, method, REQUESTS, PRESERVE, SEED)
    rollout = parts.rollout
    objective = Objective(method.objective, backbone.tokenizer, SEED)
    return (
        Trajectory(rollout, objective, REQUESTS, config, SEED),
        Gradients(rollout.selector, rollout.updater),
    )


def segment(trajectory, gradients, steps=2):
    """What a segment returned, without the clock."""
    done = trajectory.run(steps, gradients.backward)
    taken, _ = gradients.take()
    return [dataclasses.replace(step, seconds=0.0) for step in done], taken


def through_json(state: Snapshot) -> Snapshot:
    return Snapshot(dict(state.tensors), json.loads(json.dumps(state.values)))


METHODS = {
    "policy": HIEDIT,
    "plackett-luce": dataclasses.replace(
        HIEDIT,
        selector=dataclasses.replace(HIEDIT.selector, estimator="plackett_luce", samples=3),
    ),
    "random": dataclasses.replace(HIEDIT, selector=SelectorConfig("random", k=2)),
    "against-the-base": dataclasses.replace(
        HIEDIT, objective=ObjectiveConfig("trajectory", back_depth=2, rho=0.1, reference="base")
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_restored_trajectory_goes_on_with_the_same_bits(backbone, name):
    """Mid-stream, on another replica that has seen other things meanwhile."""
    twin = copy.deepcopy(backbone)
    trajectory, gradients = make(backbone, METHODS[name])
    segment(trajectory, gradients, 1)
    segment(trajectory, gradients, 3)
    assert trajectory.rollout.env.state.acc  # within a stream: there are edits to carry
    state, published = through_json(trajectory.state()), learned_state(gradients.modules)
    expected = [segment(trajectory, gradients, 1), segment(trajectory, gradients, 1)]

    other, theirs = make(twin, METHODS[name])
    segment(other, theirs, 2)
    other.load_state(state)
    load_learned_state(theirs.modules, published)
    for steps, taken in expected:
        again, taken_again = segment(other, theirs, 1)
        assert again == steps and same(taken_again, taken) and taken
    ours, others = backbone.model.state_dict(), twin.model.state_dict()
    assert same(ours, others)


def test_everything_in_the_state_counts(backbone):
    """Each part of it left out changes what follows, or it need not be there."""
    trajectory, gradients = make(backbone)
    segment(trajectory, gradients, 4)
    state, published = trajectory.state(), learned_state(gradients.modules)
    expected = segment(trajectory, gradients, 2)
    kinds = {name.split(".")[0] for name in state.tensors}
    assert {"acc", "memory", "known", "random"} <= kinds
    for kind, key in (("acc", None), ("memory", None), (None, "past"), (None, "random")):
        tensors = {n: t for n, t in state.tensors.items() if not kind or n.split(".")[0] != kind}
        values = dict(state.values)
        if key == "past":
            values["past"] = []
        elif key == "random":
            values["random"] = [3, [*values["random"][1][:-1], 0], None]
            values["random"][1][0] ^= 1
        trajectory.load_state(Snapshot(tensors, values))
        load_learned_state(gradients.modules, published)
        steps, taken = segment(trajectory, gradients, 2)
        assert not (steps == expected[0] and same(taken, expected[1])), kind or key
    trajectory.load_state(state)
    load_learned_state(gradients.modules, published)
    steps, taken = segment(trajectory, gradients, 2)
    assert steps == expected[0] and same(taken, expected[1])


def test_what_lies_below_the_lowest_module_is_part_of_the_state(base_model):
    """Of the earlier edits in reach alone, and nothing of it is computed again elsewhere."""
    modules = ["model.layers.1.mlp.gate_proj"]
    backbone, twin = (
        Backbone(copy.deepcopy(base_model), tiny_tokenizer(), modules) for _ in range(2)
    )
    method = dataclasses.replace(HIEDIT, selector=SelectorConfig("all"))
    trajectory, gradients = make(backbone, method)
    assert backbone.prefix.depth == 1 and not len(backbone.prefix.cache)
    segment(trajectory, gradients, 3)
    state = through_json(trajectory.state())
    assert 0 < len(backbone.prefix.cache) <= 4 == 2 * len(state.values["past"]) + 2
    other, _ = make(twin, method)
    other.load_state(state)
    for key in map(tuple, state.values["prefix"]):
        assert torch.equal(twin.prefix.cache.get(key), backbone.prefix.cache.get(key))
    assert len(twin.prefix.cache) == len(backbone.prefix.cache)


def test_segments_are_the_streams_cut_in_pieces(backbone):
    whole, gradients = make(backbone)
    steps, _ = segment(whole, gradients, 100)
    assert [step.edit for step in steps] == [1, 2, 3, 4, 5, 6]
    pieces, gradients = make(backbone)
    cut = [segment(pieces, gradients, 4)[0] for _ in range(3)]
    assert [len(piece) for piece in cut] == [4, 2, 0]
    assert [(s.edit, s.stream) for piece in cut for s in piece] == [
        (s.edit, s.stream) for s in steps
    ]


def test_a_segment_ends_where_it_is_told_to(backbone):
    trajectory, gradients = make(backbone)
    done = trajectory.run(5, gradients.backward, lambda step: step.edit == 2)
    assert [step.edit for step in done] == [1, 2] and trajectory.edits == 2


# Observations


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = RunningNorm(2, 3), RunningNorm(1, 4)


def batches():
    g = torch.Generator().manual_seed(0)
    for tokens in (1, 7, 0, 30):
        yield "a", torch.randn(2, tokens, 3, generator=g) * 5 + 2
        yield "b", torch.randn(1, tokens, 4, generator=g)
    yield "a", torch.full((2, 4, 3), torch.nan)


def test_replayed_observations_have_the_bits_of_the_original():
    plain, worker, learner = Normed(), Normed(), Normed()
    for name, x in batches():
        getattr(plain, name).observe(x)
    with recorded({"part": worker}) as seen:
        for name, x in batches():
            getattr(worker, name).observe(x)
    assert len(seen) == 6 and {s.norm for s in seen} == {"part.a", "part.b"}  # 3 are left out
    replay({"part": learner}, seen)
    assert plain.a.count == 38
    for copied in (worker, learner):
        assert same(plain.state_dict(), copied.state_dict())
    worker.a.observe(torch.ones(2, 5, 3))  # recorded no longer
    assert len(seen) == 6 and worker.a.count == 43


def test_merging_two_workers_is_observing_both():
    one, two = (torch.randn(2, n, 3, dtype=torch.float32) * n for n in (20, 50))
    together, merged = RunningNorm(2, 3), RunningNorm(2, 3)
    together.observe(torch.cat([one, two], 1))
    for x in (one, two):
        with recorded({"n": torch.nn.ModuleList([copy := RunningNorm(2, 3)])}) as seen:
            copy.observe(x)
        replay({"n": torch.nn.ModuleList([merged])}, seen)
    torch.testing.assert_close(merged.mean, together.mean)
    torch.testing.assert_close(merged.std, together.std)


# The learner of several workers


def learners(backbone, count=2):
    for _ in range(count):
        rollout = build_method(backbone, HIEDIT, REQUESTS, PRESERVE, SEED).rollout
        yield Learner(rollout.selector, rollout.updater, clip=1.0, steps_per_update=2)


def draw(learner, seed) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=g) for n, p in learner.named().items()}


def test_the_learner_takes_the_mean_of_the_workers(backbone):
    ours, theirs = learners(backbone)
    one, two = draw(ours, 1), draw(ours, 2)
    assert ours.update([Contribution(one, []), Contribution(two, [], dropped=3)])
    for name, parameter in theirs.named().items():
        parameter.grad = (one[name] + two[name]) / 2
    theirs.step()
    assert same(ours.published(), theirs.published())
    assert (ours.version, ours.dropped) == (1, 3)
    before = ours.published()
    assert not ours.update([Contribution({}, [])])  # a worker whose streams have ended
    assert ours.version == 1 and same(ours.published(), before)


def test_a_restored_learner_steps_with_the_same_bits(backbone):
    ours, theirs = learners(backbone)
    for seed in range(3):
        ours.update([Contribution(draw(ours, seed), [])])
    theirs.load_state(through_json(ours.state()))
    assert theirs.version == 3
    for learner in (ours, theirs):
        learner.update([Contribution(draw(learner, 9), [])])
    assert same(ours.published(), theirs.published())
    assert same(ours.state().tensors, theirs.state().tensors)


def test_a_state_of_another_method_is_refused(backbone):
    (learner,) = learners(backbone, 1)
    state = learner.state()
    wrong = {**state.tensors, "updater.groups.0.log_eta": torch.zeros(9)}
    with pytest.raises(ValueError, match=r"log_eta \(9,\) does not fit.*has \(2,\)"):
        learner.load_state(Snapshot(wrong, state.values))
    assert same(learner.state().tensors, state.tensors)
