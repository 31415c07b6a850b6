"""The model's own text, and moments that are measured once."""

from __future__ import annotations

import copy

import pytest
import torch
from models import tiny_model, tiny_tokenizer
from safetensors.torch import save_file

from hiedit.backbone.model import Backbone
from hiedit.knowledge import kept, moments, own_text

NAMES = ["model.layers.{0-1}.mlp.down_proj"]
PAIRS = [("Rome lies in", "Italy"), ("Lima is in", "Peru")]


@pytest.fixture
def backbone():
    return Backbone(tiny_model("llama", num_hidden_layers=2), tiny_tokenizer(), NAMES)


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    monkeypatch.setenv("HIEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(own_text, "_RECENT", {})
    monkeypatch.setattr(own_text, "FEWEST_WORDS", 2)


def test_text_is_the_same_for_a_seed_and_leaves_the_generator_alone(backbone):
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    first = own_text.own_text(backbone, 12)
    assert torch.equal(torch.rand(2), wanted)
    own_text._RECENT.clear()
    assert own_text.own_text(backbone, 12) == first and first
    assert own_text.own_text(backbone, 12, seed=1) != first
    assert all(a and b and " " not in b for a, b in first)


def test_it_is_plain_sampling_whatever_the_model_says(backbone):
    first = own_text.own_text(backbone, 6)
    backbone.model.generation_config.repetition_penalty = 5.0
    backbone.model.generation_config.min_length = 40
    own_text._RECENT.clear()
    assert own_text.own_text(backbone, 6) == first


@pytest.mark.parametrize("large", [False, True])
def test_a_large_models_are_kept_on_disk(backbone, monkeypatch, tmp_path, large):
    monkeypatch.setattr(kept, "WORTH", 0 if large else 10**9)
    first = own_text.own_text(backbone, 6)
    found = moments.moments_of(backbone, PAIRS, "all")
    own_text._RECENT.clear()

    def never(*_):
        raise AssertionError("computed again")

    if large:
        monkeypatch.setattr(own_text, "_written", never)
        monkeypatch.setattr(moments, "key_moments", never)
    assert (tmp_path / "cache").exists() == large
    assert own_text.own_text(backbone, 6) == first
    again = moments.moments_of(backbone, PAIRS, "all")
    for name in backbone.names:
        assert torch.equal(found[name].moment, again[name].moment)
        assert torch.equal(found[name].typical, again[name].typical)


@pytest.mark.parametrize("damage", ["no file of tensors", "a tensor missing"])
def test_a_damaged_file_is_measured_again_and_other_weights_are_another_model(
    backbone, monkeypatch, tmp_path, damage
):
    monkeypatch.setattr(kept, "WORTH", 0)
    found = moments.moments_of(backbone, PAIRS, "all")
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        if damage == "a tensor missing":
            save_file({"moment": torch.zeros(2, 2)}, path)
        else:
            path.write_bytes(b"no tensors")
    again = moments.moments_of(backbone, PAIRS, "all")
    name = backbone.names[0]
    assert torch.equal(found[name].moment, again[name].moment)
    other = copy.deepcopy(backbone)
    with torch.no_grad():
        other.model.model.embed_tokens.weight.mul_(1.1)
    changed = moments.moments_of(other, PAIRS, "all")
    assert not torch.equal(found[name].moment, changed[name].moment)
