"""Edited tiny models for the tests of exports."""

from __future__ import annotations

import copy

import pytest
import torch
from models import VOCABULARY, tiny_model, tiny_tokenizer
from safetensors.torch import load_file

from hiedit.backbone.model import Backbone
from hiedit.ledger.export import export_adapter
from hiedit.ledger.state import DeltaState
from hiedit.types import Shift

# Modules of several shapes, attention among them; fused ones where the architecture fuses.
MODULES = {
    "llama": ["model.layers.{1-2}.mlp.gate_proj", "*.2.mlp.down_proj", "*.0.self_attn.k_proj"],
    "gpt2": ["*.{1-2}.mlp.c_fc", "*.3.mlp.c_proj", "*.0.attn.c_attn"],
    "gpt_neox": ["*.{1-2}.mlp.dense_h_to_4h", "*.0.attention.query_key_value"],
    "opt": ["*.{1-2}.fc1", "*.3.fc2", "*.0.self_attn.q_proj"],
}
every = pytest.mark.parametrize("architecture", list(MODULES))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
IDS = torch.randint(3, VOCABULARY, (4, 11), generator=torch.Generator().manual_seed(9))


class Edited:
    """An edited model: the backbone, its state, the rank rows of all edits, and the base model.

    size: of an edit's factors; every further edit is ``fall`` times as large as the one before.
    """

    def __init__(self, architecture="llama", dtype=torch.float32, edits=3, rank=2, modules=None,
                 model=None, size=0.1, fall=1.0):  # fmt: skip
        model = model or tiny_model(architecture)
        for parameter in model.parameters():  # as from_pretrained does: not the rotary buffers
            parameter.data = parameter.data.to(dtype)
        self.base = copy.deepcopy(model)
        self.backbone = Backbone(model, tiny_tokenizer(), modules or MODULES[architecture])
        self.model, self.modules = self.backbone.model, self.backbone.modules
        self.state = DeltaState(self.modules)
        self.rows = {}
        g = torch.Generator().manual_seed(5)
        for edit in range(edits):
            chosen = [n for i, n in enumerate(self.modules) if i == 0 or (i + edit) % 3]
            shifts = {}
            for name in chosen:
                i, o = self.modules[name].shape
                scale = torch.rand(rank, generator=g) + 0.5
                A, B = torch.randn(rank, i, generator=g), torch.randn(o, rank, generator=g)
                B = B * size * fall**edit
                shifts[name] = Shift(A, B, scale)
                self.rows.setdefault(name, []).append((A, B * scale))
            self.state.commit(shifts)

    @property
    def factors(self):
        return {
            name: tuple(torch.cat([r[i] for r in rows], dim=i) for i in (0, 1))
            for name, rows in self.rows.items()
        }

    def export(self, directory, factors="known", **options):
        factors = self.factors if factors == "known" else factors
        return export_adapter(directory, self.backbone, self.state, factors, **options)

    def delta(self, name):
        """[O, I]."""
        acc = self.state.acc[name]
        return acc.T if self.modules[name].conv1d else acc


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits.float()


def apart(one, other):
    """Distance relative to ``other``."""
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


def weights_of(adapter, name):
    """lora_A [k, I] and lora_B [O, k] of a module, from the file."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    return tuple(tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
