"""What stands before an edit's positions, computed once: equal to computing it at every pass."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from backbones import hooks
from models import pad_batch, random_sequences, tiny_model, tiny_tokenizer
from torch.testing import assert_close

from hiedit import extension
from hiedit.backbone import fused
from hiedit.backbone.losses import answer_confidence
from hiedit.backbone.model import Backbone
from hiedit.backbone.signals import Probe, edit_tokens
from hiedit.config import MethodConfig, from_mapping
from hiedit.data.tokens import encode
from hiedit.methods import build_method
from hiedit.types import EditBatch, EditRequest, Shift

pytestmark = pytest.mark.usefixtures("one_thread")

TIGHT, GRADS = {"rtol": 1e-5, "atol": 1e-5}, {"rtol": 1e-4, "atol": 1e-6}
# The fused operators want heads of 16; no window, or such a batch is never packed.
SIZE = {"hidden_size": 64, "head_dim": 16, "sliding_window": None}
MIDDLE = ["model.layers.{1-2}.mlp.down_proj", "model.layers.2.mlp.gate_proj"]
LAST = ["model.layers.{2-3}.mlp.down_proj"]
# Of random_sequences(): inside, nowhere (then where the answer is predicted), at the second token,
# at the first.
PLACES = (4, None, 1, 0)
PRESERVE = [("Rome lies in", "Italy"), ("Lima is in", "Peru"), ("Ink is", "blue")]
OSLO = EditRequest("In old Oslo one", "eats", subject="Oslo")

architectures = pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2"])
sides = pytest.mark.parametrize("side", ["left", "right"])


@pytest.fixture(params=["reference", "auto"])
def backend(request, monkeypatch):
    monkeypatch.setenv("HIEDIT_BACKEND", request.param)
    return request.param


def placed(side: str, places=PLACES):
    """Sequences of several lengths whose subjects stand at different places."""
    batch = pad_batch(random_sequences(), side)
    begins = batch.attention.argmax(1).tolist()
    columns = [-1 if p is None else b + p for b, p in zip(begins, places, strict=True)]
    return dataclasses.replace(batch, subject=torch.tensor(columns))


def first_of(batch):
    return edit_tokens(batch, "subject").long().argmax(-1)


def before(batch):
    """bool [N, S]: what stands before the edited positions."""
    columns = torch.arange(batch.ids.shape[1])
    return batch.attention.bool() & (columns < first_of(batch)[:, None])


def probes(backbone, batch, shifts):
    """With and without the past, under ``shifts``."""
    past = backbone.past(batch, first_of(batch))
    assert past is not None and len(past.memory) == 4 - backbone.prefix.depth
    with backbone.shifted(shifts), backbone.capture() as (inputs, _):
        backbone.answers(batch, past)
        rows = {x.shape[1] for x in inputs.values()}
        kept = (past.batch.labels != -100).sum()
        assert rows <= {int((batch.attention.bool() & ~before(batch)).sum()), int(kept)}
    with backbone.shifted(shifts):
        return Probe(backbone, batch, 3, "subject", past), Probe(backbone, batch, 3, "subject")


def assert_equal_probes(one, other):
    assert_close(one.loss, other.loss, **TIGHT)
    assert_close(one.confidence, other.confidence, **TIGHT)
    mine, theirs = one.signals(), other.signals()
    assert torch.equal(mine.edit, theirs.edit) and list(mine.keys) == list(theirs.keys)
    for name in mine.keys:
        assert_close(mine.keys[name], theirs.keys[name], **TIGHT)
        assert_close(mine.grads[name], theirs.grads[name], **GRADS)
        assert theirs.grads[name].abs().max() > 1e-4


def blind_shifts(backbone, batch):
    """Shifts that matter, but change nothing at the positions before the edited ones."""
    draw = torch.Generator().manual_seed(1)
    with backbone.capture() as (inputs, _):
        backbone.answers(batch)
    shifts = {}
    for name, module in backbone.modules.items():
        flat = inputs[name].reshape(-1, module.in_features)
        where = before(batch)
        seen = flat[
            (where if len(flat) == where.numel() else where[batch.attention.bool()]).reshape(-1)
        ]
        a = torch.randn(2, module.in_features, generator=draw)
        a = a - a @ torch.linalg.pinv(seen) @ seen
        shifts[name] = Shift(a, 0.1 * torch.randn(module.out_features, 2, generator=draw))
    return shifts


@architectures
@sides
@pytest.mark.parametrize("modules", [MIDDLE, LAST], ids=["middle", "last"])
@pytest.mark.parametrize("kept", [1 << 20, 0], ids=["prefix", "no prefix"])
def test_a_probe_is_that_of_the_whole_prompts(architecture, side, modules, kept, backend):
    model = tiny_model(architecture, attn_implementation="sdpa", **SIZE)
    backbone = Backbone(model, None, modules, kept)
    assert backbone.prefix.depth == (0 if not kept else 1 if modules is MIDDLE else 2)
    assert fused.usable(model) == (backend == "auto" and extension.load().available)
    batch, count = placed(side), hooks(model)
    assert_equal_probes(*probes(backbone, batch, {}))
    shifts = blind_shifts(backbone, batch)
    assert_equal_probes(*probes(backbone, batch, shifts))
    with backbone.shifted(shifts):
        moved = (
            backbone.answers(batch).logits - Backbone(model, None, modules).answers(batch).logits
        )
    assert hooks(model) == count and model.config._attn_implementation == "sdpa"
    assert moved.abs().max() == 0  # both saw the shifts, which hang on the model's own modules


@sides
def test_rows_that_begin_with_the_edited_token_see_every_shift(side, backend):
    """Shifts that act on earlier tokens too are seen where there are none."""
    backbone = Backbone(tiny_model("llama", **SIZE), None, MIDDLE)
    batch = placed(side)
    shifts = {
        name: Shift(torch.randn(2, m.in_features), 0.1 * torch.randn(m.out_features, 2))
        for name, m in backbone.modules.items()
    }
    past = backbone.past(batch, first_of(batch))
    with backbone.shifted(shifts):
        part, whole = backbone.answers(batch, past), backbone.answers(batch)
    assert torch.equal(part.row, whole.row) and torch.equal(part.target, whole.target)
    wrong = (part.logits - whole.logits).abs().amax(-1)
    assert wrong[part.row == 3].max() < 1e-4 < wrong[part.row == 0].max()


def test_it_is_none_where_it_would_not_be_right():
    batch = placed("left")
    first = first_of(batch)

    def past(architecture="llama", where=first, **size):
        model = tiny_model(architecture, **size)
        names = "*.mlp.c_fc" if architecture == "gpt2" else LAST
        return Backbone(model, None, names).past(batch, where)

    assert past() is not None
    assert past("gpt2") is None and past("gemma2") is None
    assert past(attn_implementation="eager") is None
    assert past("mistral", sliding_window=4) is None
    assert past(where=torch.zeros_like(first)) is None  # nothing before
    late = first.clone()
    late[0] = batch.ids.shape[1] - 1  # some of its answer is predicted earlier
    assert past(where=late) is None


def test_it_is_none_where_parameters_are_sharded():
    """ZeRO-3 gathers them in the order of the first pass."""
    batch, model = placed("left"), tiny_model("llama")
    backbone = Backbone(model, None, LAST)
    assert backbone.past(batch, first_of(batch)) is not None
    model.model.layers[1].mlp.up_proj.weight.ds_id = 3
    assert backbone.past(batch, first_of(batch)) is None


# ---- edits


def config(**passes):
    values = {"max": 30, "target_probability": 0.7, **passes}
    updater = {"tokens": "subject", "contexts": 2, "preserve_tokens": "all", "eta": 0.3}
    return from_mapping(MethodConfig, {"updater": updater, "passes": values})


@pytest.fixture(scope="module")
def sure():
    made = {name: tiny_model(name, num_hidden_layers=2) for name in ("llama", "gpt2")}
    with torch.no_grad():
        made["llama"].lm_head.weight.mul_(6)  # so that it can be sure of something
        made["gpt2"].lm_head.weight.mul_(6)
    return made


@pytest.fixture
def edit(sure, monkeypatch):
    """Edits a copy of a model; returns (outcome, rollout, the past of every probe)."""

    def run(architecture="llama", on_pass=None, doubts=0, **passes):
        model = copy.deepcopy(sure[architecture])
        names = "*.mlp.c_proj" if architecture == "gpt2" else "model.layers.{0-1}.mlp.down_proj"
        backbone = Backbone(model, tiny_tokenizer(), names)
        rollout = build_method(backbone, config(**passes), preserve=PRESERVE).rollout
        seen, probe, confirmed = [], rollout.env.probe, rollout._confirmed
        left = [doubts]

        def spy(batch, edits, tokens, past=None):
            seen.append(past)
            return probe(batch, edits, tokens, past)

        def doubt(tokens, target):
            left[0] -= 1
            return confirmed(tokens, target) if left[0] < 0 else False

        monkeypatch.setattr(rollout.env, "probe", spy)
        monkeypatch.setattr(rollout, "_confirmed", doubt)
        given = None
        if on_pass:

            def given(signals, action):
                with torch.no_grad():
                    return rollout.updater(signals, action.mask)

        return rollout.propose(EditBatch((OSLO,)), given), rollout, seen

    return run


def holds(rollout) -> float:
    backbone = rollout.env.backbone
    batch = encode(backbone.tokenizer, [(OSLO.prompt, OSLO.target)], padding_side="left")
    with torch.no_grad():
        return float(answer_confidence(rollout.env.answers(batch)))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_edit_at_the_subject_holds_on_its_whole_prompt(edit, architecture, backend):
    outcome, rollout, seen = edit(architecture)
    assert all((past is None) == (architecture == "gpt2") for past in seen[:2])
    assert outcome.held and outcome.passes >= 2 and holds(rollout) > 0.7
    rollout.commit(outcome)
    assert holds(rollout) > 0.7
    (after, *_) = [rollout.propose(EditBatch((OSLO,)))]
    assert after.passes == 0 or after.held  # contexts may ask for more


def test_an_edit_that_does_not_hold_goes_on_with_whole_prompts(edit):
    outcome, rollout, seen = edit(doubts=1)
    assert seen[0] is not None and seen[-1] is None
    assert outcome.held and holds(rollout) > 0.7
    assert float(outcome.confidence) == pytest.approx(
        float(
            rollout.env.probe(
                rollout._encode(EditBatch((OSLO,)), [], True), 1, "subject"
            ).confidence
        )
    )


def test_training_sees_whole_prompts(edit):
    _, _, seen = edit(on_pass=True, max=2)
    assert seen and not any(seen)
