"""Causal tracing against one plain forward pass per run."""

from __future__ import annotations

import pytest
import torch
from models import tiny_model, tiny_tokenizer
from torch.testing import assert_close

from hiedit.backbone.model import Backbone
from hiedit.data.tokens import encode
from hiedit.evaluation.probes import causal_tracing, subject_tokens
from hiedit.types import EditRequest

pytestmark = pytest.mark.usefixtures("one_thread")
REQUEST = EditRequest("In Oslo they say", "hm", subject="Oslo", old_target="yes")
MODULES = {
    "llama": ["model.layers.{1-2}.mlp.gate_proj", "model.layers.2.mlp.up_proj"],
    "gpt2": ["transformer.h.{1-2}.mlp.c_fc"],
    "opt": ["model.decoder.layers.{1-2}.fc1"],
}


def make(architecture) -> Backbone:
    return Backbone(tiny_model(architecture), tiny_tokenizer(), MODULES[architecture])


def plainly(backbone, request, parent, place, noise) -> float:
    """The rise in probability, one run after another. parent: of the module; noise: [S, H]."""
    model = backbone.model
    text = f"{request.prompt} {request.old_target}"
    ids = backbone.tokenizer(text, return_tensors="pt")["input_ids"]
    first = len(request.prompt) + 1  # one token a character, after <s>: the space of the answer
    answer, ids = int(ids[0, first]), ids[:, :first]
    embedded = model.get_input_embeddings()(ids)
    clean = {}

    def keep(_, __, out):
        clean["out"] = out.detach()

    handle = model.get_submodule(parent).register_forward_hook(keep)
    model(input_ids=ids)
    handle.remove()
    corrupted = embedded + noise[: ids.shape[1]]
    base = model(inputs_embeds=corrupted).logits[0, -1].softmax(-1)[answer]

    def restore(_, __, out):
        out = out.clone()
        out.view(1, ids.shape[1], -1)[:, place] = clean["out"].view(1, ids.shape[1], -1)[:, place]
        return out

    handle = model.get_submodule(parent).register_forward_hook(restore)
    value = model(inputs_embeds=corrupted).logits[0, -1].softmax(-1)[answer]
    handle.remove()
    return float(value - base)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@torch.no_grad()
def test_tracing_equals_one_run_after_another(architecture):
    backbone = make(architecture)
    before = {n: p.clone() for n, p in backbone.model.state_dict().items()}
    found = causal_tracing(backbone, [REQUEST], samples=1, noise=2.0, seed=4)
    assert found.shape == (1, len(backbone.names), 2)
    batch = encode(backbone.tokenizer, [(REQUEST.prompt, REQUEST.old_target)])
    subject = subject_tokens(backbone.tokenizer, REQUEST, batch)
    text = backbone.tokenizer.decode([int(batch.ids[0, i]) for i in subject])
    assert text.replace(" ", "") == "Oslo"
    weight = backbone.model.get_input_embeddings().weight
    drawn = torch.randn(1, len(subject), weight.shape[1],
                        generator=torch.Generator().manual_seed(4))  # fmt: skip
    noise = torch.zeros(batch.ids.shape[1], weight.shape[1])
    noise[subject] = 2.0 * weight.std() * drawn[0]
    last = int((batch.labels[0] != -100).nonzero()[0]) - 1
    for column, name in enumerate(backbone.names):
        for place, tokens in enumerate((subject, [last])):
            wanted = plainly(backbone, REQUEST, name.rpartition(".")[0], tokens, noise)
            assert_close(float(found[0, column, place]), wanted, rtol=1e-3, atol=1e-6)
    assert found.abs().max() > 1e-5
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, before[name])


@torch.no_grad()
def test_modules_of_one_mlp_share_its_effect_and_samples_are_a_mean():
    backbone = make("llama")
    assert [n.split(".")[2] for n in backbone.names] == ["1", "2", "2"]
    one = causal_tracing(backbone, [REQUEST], samples=3, seed=0)
    assert torch.equal(one[0, 1], one[0, 2]) and not torch.equal(one[0, 0], one[0, 1])
    again = causal_tracing(backbone, [REQUEST, REQUEST], samples=3, seed=0)
    assert_close(again[0], one[0]) and not torch.equal(again[0], again[1])  # fresh noise


def test_without_a_subject_there_is_no_trace():
    backbone = make("llama")
    lost = EditRequest("In Rome they say", "hm", subject="Oslo", old_target="yes")
    unknown = EditRequest("In Oslo they say", "hm", subject="Oslo")
    found = causal_tracing(backbone, [lost, unknown, REQUEST], samples=1)
    assert found[:2].isnan().all() and found[2].isfinite().all()
    assert causal_tracing(backbone, []).shape == (0, 3, 2)
