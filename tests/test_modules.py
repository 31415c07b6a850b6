"""Which layers may be edited: names, ranges, globs, defaults, and what is never editable."""

import pytest
from models import ARCHITECTURES, HIDDEN, LAYERS, MLP, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from hiedit.backbone.model import Backbone
from hiedit.backbone.modules import (
    candidates,
    default_modules,
    expand_ranges,
    linear_layers,
    resolve_modules,
)

# Every linear layer of one decoder layer, in the model's own order, and (I, O) of each.
H, M, KV = HIDDEN, MLP, HIDDEN // 2
_LLAMA = {
    "self_attn.q_proj": (H, H),
    "self_attn.k_proj": (H, KV),
    "self_attn.v_proj": (H, KV),
    "self_attn.o_proj": (H, H),
    "mlp.gate_proj": (H, M),
    "mlp.up_proj": (H, M),
    "mlp.down_proj": (M, H),
}
_PHI = {
    "self_attn.q_proj": (H, H),
    "self_attn.k_proj": (H, KV),
    "self_attn.v_proj": (H, KV),
    "self_attn.dense": (H, H),
    "mlp.fc1": (H, M),
    "mlp.fc2": (M, H),
}
_GPTJ = {
    "attn.k_proj": (H, H),
    "attn.v_proj": (H, H),
    "attn.q_proj": (H, H),
    "attn.out_proj": (H, H),
    "mlp.fc_in": (H, M),
    "mlp.fc_out": (M, H),
}
_NEOX = {
    "attention.query_key_value": (H, 3 * H),
    "attention.dense": (H, H),
    "mlp.dense_h_to_4h": (H, M),
    "mlp.dense_4h_to_h": (M, H),
}
_OPT = {
    "self_attn.k_proj": (H, H),
    "self_attn.v_proj": (H, H),
    "self_attn.q_proj": (H, H),
    "self_attn.out_proj": (H, H),
    "fc1": (H, M),
    "fc2": (M, H),
}
_GPT2 = {
    "attn.c_attn": (H, 3 * H),
    "attn.c_proj": (H, H),
    "mlp.c_fc": (H, M),
    "mlp.c_proj": (M, H),
}
# By architecture: path of the layers, its linear layers, the MLP's input projections.
EXPECTED = {
    "llama": ("model.layers", _LLAMA, ["mlp.gate_proj", "mlp.up_proj"]),
    "gemma2": ("model.layers", _LLAMA, ["mlp.gate_proj", "mlp.up_proj"]),
    "qwen2": ("model.layers", _LLAMA, ["mlp.gate_proj", "mlp.up_proj"]),
    "mistral": ("model.layers", _LLAMA, ["mlp.gate_proj", "mlp.up_proj"]),
    "phi": ("model.layers", _PHI, ["mlp.fc1"]),
    "gptj": ("transformer.h", _GPTJ, ["mlp.fc_in"]),
    "gpt_neox": ("gpt_neox.layers", _NEOX, ["mlp.dense_h_to_4h"]),
    "opt": ("model.decoder.layers", _OPT, ["fc1"]),
    "gpt2": ("transformer.h", _GPT2, ["mlp.c_fc"]),
}
# By architecture: the MLP's output projection.
OUTPUTS = dict.fromkeys(("llama", "gemma2", "qwen2", "mistral"), "mlp.down_proj") | {
    "phi": "mlp.fc2",
    "gptj": "mlp.fc_out",
    "gpt_neox": "mlp.dense_4h_to_h",
    "opt": "fc2",
    "gpt2": "mlp.c_proj",
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def model(architecture):
    return tiny_model(architecture)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


# ---- every architecture


def test_every_linear_layer_is_found_with_its_shape(architecture, model):
    path, layers, _ = EXPECTED[architecture]
    expected = [(f"{path}.{i}.{n}", shape) for i in range(LAYERS) for n, shape in layers.items()]
    found = linear_layers(model)
    assert [(m.name, m.shape) for m in found.values()] == expected
    assert list(found) == [name for name, _ in expected]
    for name, layer in found.items():
        assert layer.module is model.get_submodule(name)
        assert layer.weight is layer.module.weight
        assert layer.conv1d == isinstance(layer.module, Conv1D) == (architecture == "gpt2")
        stored = tuple(layer.weight.shape)
        assert stored == (layer.shape if layer.conv1d else layer.shape[::-1])


def test_candidates_are_the_mlps_outputs(architecture, model):
    path = EXPECTED[architecture][0]
    expected = {f"{path}.{i}.{OUTPUTS[architecture]}": i for i in range(LAYERS)}
    assert candidates(model) == expected and list(candidates(model)) == list(expected)


def test_default_is_the_candidates_from_an_eighth_to_a_half(architecture, model):
    expected = [f"{EXPECTED[architecture][0]}.1.{OUTPUTS[architecture]}"]
    assert default_modules(model) == expected
    assert list(resolve_modules(model)) == expected
    assert Backbone(model, None).names == expected


def test_output_embedding_is_never_editable(architecture, model):
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head]
    assert names and isinstance(head, nn.Linear)
    assert all(layer.module is not head for layer in resolve_modules(model, "*").values())
    with pytest.raises(ValueError, match="is no linear layer"):
        resolve_modules(model, names[0])


def test_ranges_and_globs_by_architecture(architecture, model):
    path, layers, inputs = EXPECTED[architecture]
    by_range = resolve_modules(model, f"{path}.{{1-2}}.{inputs[0]}")
    assert list(by_range) == [f"{path}.{i}.{inputs[0]}" for i in (1, 2)]
    by_glob = resolve_modules(model, f"{path}.*.{inputs[0]}")
    assert list(by_glob) == [f"{path}.{i}.{inputs[0]}" for i in range(LAYERS)]
    assert len(resolve_modules(model, f"{path}.3.*")) == len(layers)


# ---- how names are written

GATE, UP = "model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"


def test_the_order_is_the_models_whatever_the_order_of_the_names(llama):
    spec = [UP.format(3), GATE.format(3), "model.layers.{2,0}.mlp.up_proj"]
    expected = [UP.format(0), UP.format(2), GATE.format(3), UP.format(3)]
    assert list(resolve_modules(llama, spec)) == expected
    assert list(resolve_modules(llama, spec[::-1])) == expected
    assert list(resolve_modules(llama, tuple(spec))) == expected


def test_a_module_named_twice_counts_once(llama):
    assert list(resolve_modules(llama, [GATE.format(1), "*.1.mlp.gate_proj"])) == [GATE.format(1)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.{3-5}.b", ["a.3.b", "a.4.b", "a.5.b"]),
        ("a.{1,4-6}.b", ["a.1.b", "a.4.b", "a.5.b", "a.6.b"]),
        ("a.{7}.b", ["a.7.b"]),
        ("a.{1, 3 - 4}.b", ["a.1.b", "a.3.b", "a.4.b"]),
        ("{0-1}.{2,3}", ["0.2", "0.3", "1.2", "1.3"]),
        ("a.b", ["a.b"]),
    ],
    ids=["range", "list", "single", "spaces", "two", "none"],
)
def test_ranges_expand(pattern, expected):
    assert expand_ranges(pattern) == expected


@pytest.mark.parametrize("inside", ["5-3", "3-", "-3", "3--4", "1,,2", "1-2-3", ","])
def test_a_malformed_range_is_an_error(inside):
    with pytest.raises(ValueError, match=r"first-last") as error:
        expand_ranges(f"model.layers.{{{inside}}}.mlp")
    assert f"{{{inside}}}" in str(error.value)


def test_an_unknown_name_is_answered_with_the_nearest(llama):
    with pytest.raises(ValueError) as error:
        resolve_modules(llama, "model.layers.1.mlp.gate_prj")
    assert "'model.layers.1.mlp.gate_prj'" in str(error.value)
    assert "nearest: model.layers.1.mlp.gate_proj" in str(error.value)


def test_one_name_of_a_range_beyond_the_model_is_an_error(llama):
    with pytest.raises(ValueError) as error:
        resolve_modules(llama, "model.layers.{2-4}.mlp.up_proj")
    assert "'model.layers.4.mlp.up_proj'" in str(error.value)
    assert "{2-4}" in str(error.value) and "nearest: model.layers." in str(error.value)


@pytest.mark.parametrize(
    "spec",
    ["*.norm", "model.layers.1.mlp", "model.embed_tokens", "zzz", ""],
    ids=["glob", "container", "embedding", "unlike", "empty"],
)
def test_what_is_no_linear_layer_is_an_error(llama, spec):
    with pytest.raises(ValueError, match="is no linear layer of this model; nearest: model"):
        resolve_modules(llama, spec)


def test_an_empty_list_is_an_error(llama):
    with pytest.raises(ValueError, match="at least one"):
        resolve_modules(llama, [])


@pytest.mark.parametrize(
    ("layers", "edited"),
    [(1, [0]), (2, [1]), (3, [1]), (5, [1]), (6, [1, 2]), (12, [2, 3, 4, 5]), (30, range(4, 15))],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_the_default_of_other_depths(layers, edited):
    names = default_modules(tiny_model("gptj", n_layer=layers))
    assert names == [f"transformer.h.{i}.mlp.fc_out" for i in edited]


def test_a_model_without_known_names_asks_for_modules():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="name the modules") as error:
        default_modules(model)
    assert "'0'" in str(error.value)
    assert list(resolve_modules(model, "1")) == ["1"]


def test_shape_groups_keep_the_models_order(llama):
    backbone = Backbone(llama, None, ["*.{1,2}.mlp.*", "*.0.self_attn.o_proj"])
    groups = backbone.shape_groups()
    assert groups == {
        (H, H): ["model.layers.0.self_attn.o_proj"],
        (H, M): [p.format(i) for i in (1, 2) for p in (GATE, UP)],
        (M, H): [f"model.layers.{i}.mlp.down_proj" for i in (1, 2)],
    }
    assert sum(groups.values(), []) != backbone.names  # grouped, the model's order is another
    assert sorted(sum(groups.values(), [])) == sorted(backbone.names)
