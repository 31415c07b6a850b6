"""Tokens whose keys are hundreds of times longer than others, planted in the weights: found,
counted apart, and left exactly as they are by every edit."""

from __future__ import annotations

import copy

import pytest
import torch
from models import tiny_model, tiny_tokenizer
from torch.testing import assert_close

from hiedit.backbone import moments
from hiedit.backbone.losses import answer_kl
from hiedit.backbone.model import Backbone, at_tokens
from hiedit.backbone.moments import key_moments, typical_power
from hiedit.config import MethodConfig, from_mapping
from hiedit.data.tokens import encode
from hiedit.methods import build_method, editor_tensors, load_editor, save_editor
from hiedit.types import EditBatch, EditRequest
from hiedit.updaters.protection import Protection

pytestmark = pytest.mark.usefixtures("one_thread")

SUNK = "model.layers.1.mlp.down_proj"
NAMES = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
PRESERVE = [("Rome lies in", "Italy"), ("Lima is in", "Peru"), ("Ink is", "blue")]
OSLO, BONN = EditRequest("Old Oslo lies", "far"), EditRequest("Bonn has", "two")
BOS = 1  # of tiny_tokenizer, always the first token


@pytest.fixture(scope="module")
def planted():
    """A Llama whose first token alone has a direction of its own, to which some neurons of layer 1
    answer beyond measure: as large models do."""
    model = tiny_model("llama", num_hidden_layers=3)
    with torch.no_grad():
        inner = model.model
        inner.embed_tokens.weight[:, 0] = 0.0
        inner.embed_tokens.weight[BOS, 0] = 3.0
        for layer in inner.layers:  # nothing else ever writes to this direction
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        mlp = inner.layers[1].mlp
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight[:2, 0] = 16.0
        model.lm_head.weight.mul_(4)  # so that it can be sure of something
    return model


@pytest.fixture
def backbone(planted):
    return Backbone(copy.deepcopy(planted), tiny_tokenizer(), NAMES)


def batches(backbone, pairs=PRESERVE):
    return [encode(backbone.tokenizer, pairs, padding_side="left")]


def keys_of(backbone, pairs=PRESERVE, name=SUNK):
    """(keys of first tokens, keys of the others)."""
    (batch,) = batches(backbone, pairs)
    with backbone.capture() as (inputs, _):
        backbone.answers(batch)
    every = at_tokens(inputs[name], batch.attention.bool(), batch.attention)
    first = batch.ids[batch.attention.bool()] == BOS
    return every[first], every[~first]


def method(backbone, **updater):
    values = {"tokens": "answer", "preserve_tokens": "all", "eta": 0.3, "lam": 0.02, **updater}
    passes = {"max": 20, "target_probability": 0.8}
    config = from_mapping(MethodConfig, {"updater": values, "passes": passes})
    return build_method(backbone, config, preserve=PRESERVE)


def protection(made) -> Protection:
    (group,) = made.rollout.updater.groups
    return group.protection


def left_of(made, keys) -> float:
    """What the protection leaves of the sunk module's ``keys``, against as long ordinary ones."""
    precision = protection(made).precision[NAMES.index(SUNK)]
    at_random = torch.randn(64, len(precision), generator=torch.Generator().manual_seed(0))
    ordinary = (at_random @ precision).norm() / at_random.norm()
    return float((keys @ precision).norm() / keys.norm() / ordinary)


# ---- found


def test_the_planted_sink_is_one(backbone):
    sinks, others = keys_of(backbone)
    assert sinks.norm(dim=-1).min() > 300 * others.norm(dim=-1).median()


@pytest.mark.parametrize("tokens", [None, "answer"])
def test_sinks_are_found_and_counted_apart(backbone, tokens):
    """Wherever the moment is taken: no answer is predicted at a first token here."""
    found = key_moments(backbone, batches(backbone), tokens)
    sinks, others = keys_of(backbone)
    one = found[SUNK]
    wanted = float(sinks.norm(dim=-1).max() / torch.cat([sinks, others]).norm(dim=-1).median())
    assert one.ratio == pytest.approx(wanted, rel=1e-3) and one.ratio > 100
    assert one.sinks.shape[0] <= 3
    assert_close(one.sinks @ one.sinks.T, torch.eye(len(one.sinks)), rtol=1e-5, atol=1e-5)
    outside = sinks - sinks @ one.sinks.T @ one.sinks
    assert outside.norm(dim=-1).max() < others.norm(dim=-1).median()
    for name in NAMES:
        if name != SUNK:
            assert found[name].sinks is None and found[name].ratio < moments.SINK
    if tokens is None:  # what is left is the moment of all but the first tokens
        assert_close(one.moment, others.T @ others / len(others), rtol=1e-4, atol=1e-5)


def test_the_moment_is_that_of_a_model_without_sinks(backbone, planted):
    """But for what the sink does to later tokens: here nothing before layer 1."""
    plain = copy.deepcopy(planted)
    with torch.no_grad():
        for projection in (plain.model.layers[1].mlp.gate_proj, plain.model.layers[1].mlp.up_proj):
            projection.weight[:2, 0] = 0.0
    unplanted = Backbone(plain, tiny_tokenizer(), NAMES)
    one = key_moments(backbone, batches(backbone))[SUNK]
    other = key_moments(unplanted, batches(backbone))[SUNK]
    assert other.sinks is None and other.ratio < moments.SINK
    _, ordinary = keys_of(unplanted)
    assert_close(one.moment, ordinary.T @ ordinary / len(ordinary), rtol=1e-4, atol=1e-5)
    assert (one.moment - other.moment).norm() < 0.3 * other.moment.norm()  # its first token counts


def test_a_typical_output_is_an_ordinary_one(backbone):
    (batch,) = batches(backbone)
    with backbone.capture() as (_, outputs):
        backbone.answers(batch)
    every = at_tokens(outputs[SUNK], batch.attention.bool(), batch.attention).detach()
    ordinary = every[batch.ids[batch.attention.bool()] != BOS]
    found = typical_power(backbone, [batch])[SUNK]
    assert found <= ordinary.square().sum(-1).max()
    assert every.square().sum(-1).mean() > 100 * found
    assert_close(key_moments(backbone, [batch])[SUNK].typical, ordinary.square().sum(-1).median())


# ---- kept


def edited(backbone, made, request=OSLO):
    """(the shift of the sunk module [O, I], KL on other prompts); the edit is then committed."""
    (batch,) = batches(backbone, PRESERVE)
    before = backbone.answers(batch).logits.log_softmax(-1)
    outcome = made.rollout.propose(EditBatch((request,)))
    assert outcome.held
    with torch.no_grad():
        kl = float(answer_kl(made.rollout.env.answers(batch), before).mean())
    made.rollout.commit(outcome)
    return outcome.shifts[SUNK].dense(), kl


def test_an_edit_leaves_the_sink_exactly_as_it_is(backbone):
    sinks, others = keys_of(backbone)
    made = method(backbone)
    assert left_of(made, sinks) < 1e-5 and left_of(made, others) > 100 * left_of(made, sinks)
    weight = backbone.model.get_submodule(SUNK).weight
    base, before = weight.clone(), sinks @ weight.T
    for request in (OSLO, BONN):
        shift, _ = edited(backbone, made, request)
        assert (sinks @ shift.T).norm() < 1e-5 * shift.norm() * sinks.norm()
        assert left_of(made, sinks) < 1e-5  # absorbed keys take nothing of that back
    assert not torch.equal(weight, base)
    assert_close(sinks @ weight.T, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def test_a_protection_that_drowns_in_the_sink_protects_nothing_else(planted, monkeypatch):
    def run():
        backbone = Backbone(copy.deepcopy(planted), tiny_tokenizer(), [SUNK])
        made = method(backbone)
        sinks, _ = keys_of(backbone)
        moved, kl = [], []
        for request in (OSLO, BONN):
            shift, other = edited(backbone, made, request)
            moved.append(float((sinks @ shift.T).norm()))
            kl.append(other)
        return sum(moved), sum(kl)

    apart = run()
    monkeypatch.setattr(moments, "SINK", float("inf"))
    drowned = run()
    print(
        f"sinks moved {apart[0]:.3g} against {drowned[0]:.3g}, KL {apart[1]:.3g}, {drowned[1]:.3g}"
    )
    assert drowned[0] > 100 * apart[0]
    assert drowned[1] > 20 * apart[1]


# ---- saved


def test_sinks_stay_with_an_editor(backbone, planted, tmp_path):
    made = method(backbone)
    fitted = protection(made).precision.clone()
    sinks, _ = keys_of(backbone)
    edited(backbone, made)
    save_editor(made, tmp_path)
    again = load_editor(Backbone(copy.deepcopy(planted), tiny_tokenizer(), NAMES), tmp_path)
    assert torch.equal(protection(again).sinks, protection(made).sinks)
    assert torch.equal(protection(again).precision, fitted)  # of no edit yet
    assert left_of(again, sinks) < 1e-5
    again.rollout.reset()
    assert left_of(again, sinks) < 1e-5


def test_an_editor_without_sinks_is_as_before(tmp_path):
    plain = Backbone(tiny_model("llama", num_hidden_layers=3), tiny_tokenizer(), NAMES)
    made = method(plain)
    assert protection(made).sinks is None
    assert not any("sinks" in name for name in editor_tensors(made))
    save_editor(made, tmp_path)
    again = load_editor(plain, tmp_path)
    assert protection(again).sinks is None
    assert torch.equal(protection(again).precision, protection(made).precision)


def test_a_state_brings_its_sinks_or_takes_them_away():
    one, other = Protection(2, 4), Protection(2, 4)
    basis = torch.eye(4)[None, :1].repeat(2, 1, 1)
    basis[1] = 0.0  # this module has none
    one.fit(torch.eye(4).repeat(2, 1, 1), torch.ones(2), sinks=basis)
    assert (
        one.precision[0, 0].abs().max() < 1e-12
        and (one.precision[0, 1:, 1:].diagonal() > 0.9).all()
    )
    assert (one.precision[1].diagonal() > 0.9).all()
    state, bare = one.state_dict(), other.state_dict()
    other.load_state_dict(state)
    other.reset()
    assert torch.equal(other.precision, one.precision)
    assert other.sinks.data_ptr() != state["sinks"].data_ptr()
    one.load_state_dict(bare)
    one.reset()
    assert one.sinks is None and (one.precision[0].diagonal() > 0.9).all()
