"""configs/model: every file says where its modules come from, and names modules that exist."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
import yaml

from hiedit.backbone.modules import resolve_modules
from hiedit.catalogue import config_dir
from hiedit.config import from_mapping
from hiedit.runconfig import ModelConfig
from hiedit.world import world_dir

FILES = sorted((config_dir() / "model").glob("*.yaml"))
NAMES = [path.stem for path in FILES]
SOURCE = re.compile(
    r"Modules: (measured by us\b|not measured, not published\b"
    r"|as in github\.com/[\w.-]+/[\w.-]+ at [0-9a-f]{40}\b)"
)

# The families and the published number of layers; widths do not matter to names.
_LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": 99}  # fmt: skip
PUBLISHED = {
    "gemma-2-9b": ("Gemma2", {**_LLAMA, "head_dim": 16, "num_hidden_layers": 42}),
    "gpt-j-6b": ("GPTJ", {"n_embd": 64, "n_layer": 28, "n_head": 4, "rotary_dim": 8}),
    "llama-3-70b": ("Llama", {**_LLAMA, "num_hidden_layers": 80}),
    "llama-3-8b": ("Llama", {**_LLAMA, "num_hidden_layers": 32}),
    "llama-3-8b-instruct": ("Llama", {**_LLAMA, "num_hidden_layers": 32}),
    "mistral-7b": ("Mistral", {**_LLAMA, "head_dim": 16, "num_hidden_layers": 32}),
    "qwen2.5-7b": ("Qwen2", {**_LLAMA, "num_hidden_layers": 28}),
    "smollm2-135m": ("Llama", {**_LLAMA, "num_hidden_layers": 30}),
}
COUNTS = {"gemma-2-9b": 18, "gpt-j-6b": 9, "llama-3-70b": 12, "llama-3-8b": 12,
          "llama-3-8b-instruct": 12, "mistral-7b": 2, "qwen2.5-7b": 18, "world": 12}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_says_where_its_modules_come_from(name):
    text = (config_dir() / "model" / f"{name}.yaml").read_text()
    comments = (line[1:] for line in text.splitlines() if line.startswith("#"))
    said = " ".join(" ".join(comments).split())
    assert SOURCE.search(said), f"{name}.yaml: {said!r}"


@pytest.mark.parametrize("name", [n for n in NAMES if n != "custom"])
def test_its_modules_exist_in_a_model_of_that_depth(name):
    values = yaml.safe_load((config_dir() / "model" / f"{name}.yaml").read_text())
    config = from_mapping(ModelConfig, values, "model")
    if name == "world":
        architecture = transformers.AutoConfig.from_pretrained(world_dir())
    else:
        family, settings = PUBLISHED[name]
        architecture = getattr(transformers, f"{family}Config")(**settings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(architecture)
    found = list(resolve_modules(model, config.modules))
    assert len(found) == COUNTS.get(name, len(found)) and len(found) >= 2
    assert config.name == name
