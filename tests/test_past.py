"""What stands before an edit's positions, computed once: equal to computing it at every pass."""

from __future__ import annotations

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
from hiedit.experiment import load_backbone
from hiedit.methods import build_method
from hiedit.runconfig import ModelConfig
from hiedit.types import EditBatch, EditRequest, Shift
from hiedit.world.preserve import preservation_pairs

pytestmark = pytest.mark.usefixtures("one_thread")

TIGHT, GRADS = {"rtol": 1e-5, "atol": 1e-5}, {"rtol": 1e-4, "atol": 1e-6}
# The fused operators want heads of 16; no window, or such a batch is never packed.
SIZE = {"hidden_size": 64, "head_dim": 16, "sliding_window": None}
MIDDLE = ["model.layers.{1-2}.mlp.down_proj", "model.layers.2.mlp.gate_proj"]
LAST = ["model.layers.{2-3}.mlp.down_proj"]
# Of random_sequences(): inside, nowhere (then where the answer is predicted), at the second token,
# at the first.
PLACES = (4, None, 1, 0)
NAMIBIA = EditRequest(
    "On the map, Namibia is found in", "South America", subject="Namibia", old_target="Africa"
)
NIGER = EditRequest("On a globe, Niger lies on the continent of", "Asia", subject="Niger")
SURE = 0.004  # hundreds of times what the world's model thinks of it

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
        assert {x.shape[1] for x in inputs.values()} == {int(past.rest.attention.sum())}
        assert torch.equal(past.rest.attention.bool(), batch.attention.bool() & ~before(batch))
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
    plain = backbone.answers(batch).logits
    with backbone.shifted(shifts):
        assert (backbone.answers(batch).logits - plain).abs().max() > 0.01
    assert hooks(model) == count and model.config._attn_implementation == "sdpa"


@sides
def test_rows_that_begin_with_the_edited_token_see_every_shift(side, backend):
    """Shifts that act on earlier tokens too are seen where there are none."""
    backbone = Backbone(tiny_model("llama", **SIZE), None, MIDDLE)
    batch = placed(side)
    torch.manual_seed(0)
    shifts = {
        name: Shift(torch.randn(2, m.in_features), 0.1 * torch.randn(m.out_features, 2))
        for name, m in backbone.modules.items()
    }
    past = backbone.past(batch, first_of(batch))
    with backbone.shifted(shifts):
        part, whole = backbone.answers(batch, past), backbone.answers(batch)
    assert torch.equal(part.row, whole.row) and torch.equal(part.target, whole.target)
    wrong = (part.logits - whole.logits).abs().amax(-1)
    assert wrong[part.row == 3].max() < 1e-3 < wrong[part.row == 0].max()


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


def method(backbone, preserve, **passes):
    values = {"max": 25, "target_probability": SURE, **passes}
    updater = {"tokens": "subject", "contexts": 2, "preserve_tokens": "all", "eta": 0.5}
    config = from_mapping(MethodConfig, {"updater": updater, "passes": values})
    return build_method(backbone, config, preserve=preserve).rollout


def confidence(rollout) -> float:
    """Of the whole prompt alone."""
    backbone = rollout.env.backbone
    batch = encode(backbone.tokenizer, [(NAMIBIA.prompt, NAMIBIA.target)], padding_side="left")
    with torch.no_grad():
        return float(answer_confidence(rollout.env.answers(batch)))


@pytest.fixture
def editing(monkeypatch):
    """A rollout on the embedded world, and the past that every probe has seen."""
    places = ModelConfig(
        modules=["model.layers.{1-4}.mlp.down_proj"], dtype="float32", device="cpu"
    )
    rollout = method(load_backbone(places), preservation_pairs()[0][:32])
    seen, probe = [], rollout.env.probe

    def spy(batch, edits, tokens, past=None):
        seen.append(past)
        return probe(batch, edits, tokens, past)

    monkeypatch.setattr(rollout.env, "probe", spy)
    return rollout, seen


def test_an_edit_at_the_subject_holds_on_its_whole_prompt(backend, editing):
    rollout, seen = editing
    assert confidence(rollout) < SURE / 10
    outcome = rollout.propose(EditBatch((NAMIBIA,)))
    assert outcome.held and outcome.passes >= 2 and seen[0] is not None
    assert confidence(rollout) > SURE
    rollout.commit(outcome)
    assert confidence(rollout) > SURE


def test_what_does_not_hold_on_the_whole_prompt_goes_on_with_that(editing, monkeypatch):
    rollout, seen = editing
    asked, confirmed = [], rollout._confirmed

    def doubtful(tokens, target):
        asked.append(confirmed(tokens, target))
        return False

    monkeypatch.setattr(rollout, "_confirmed", doubtful)
    outcome = rollout.propose(EditBatch((NAMIBIA,)))
    assert len(asked) == 1  # from then on every probe is of the whole prompts
    known = [past is not None for past in seen]
    assert known == sorted(known, reverse=True) and known[0] and not known[-1]
    assert outcome.held and confidence(rollout) >= float(outcome.confidence) > SURE
    plain = rollout.env.probe(rollout._encode(EditBatch((NAMIBIA,)), [], True), 1, "subject")
    assert_close(plain.confidence, outcome.confidence)


def test_confirmation_is_of_each_edits_own_prompt(editing):
    """With the passes on trial: on the weights as they are, nothing has to be asked."""
    rollout, _ = editing
    batch = EditBatch((NAMIBIA, NIGER))
    tokens = rollout._encode(batch, [("Rome is", "Italy")], True)
    firsts = [0, 3, 6]
    assert tokens.edit.tolist() == [0] * 3 + [1] * 3 + [2]
    assert rollout._confirmed(tokens, torch.ones(3))
    rollout.env.push(blind_shifts(rollout.env.backbone, tokens))
    with torch.no_grad():
        sure = answer_confidence(rollout.env.answers(tokens.select(torch.tensor(firsts))))
    assert rollout._confirmed(tokens, sure * 0.99)
    for edit in range(3):
        wanted = sure * 0.99
        wanted[edit] = sure[edit] * 1.01
        assert not rollout._confirmed(tokens, wanted)


def test_training_sees_whole_prompts(editing):
    rollout, seen = editing

    def on_pass(signals, action):
        with torch.no_grad():
            return rollout.updater(signals, action.mask)

    rollout.propose(EditBatch((NAMIBIA,)), on_pass)
    assert seen and not any(seen)


def test_an_architecture_that_is_not_known_is_edited_all_the_same():
    backbone = Backbone(tiny_model("gpt2"), tiny_tokenizer(), "*.{0-2}.mlp.c_proj")
    pairs = [("Rome lies in", "Italy"), ("Lima is in", "Peru"), ("Ink is", "blue")]
    rollout = method(backbone, pairs, max=3, undo=False)
    batch = rollout._encode(EditBatch((NAMIBIA,)), [], True)
    assert (batch.subject >= 0).all() and rollout.env.past(batch, "subject") is None
    before = float(rollout.env.probe(batch, 1, "subject").loss)
    outcome = rollout.propose(EditBatch((NAMIBIA,)))
    assert outcome.passes == 3 and outcome.shifts
    assert float(rollout.env.probe(batch, 1, "subject").loss) < before
