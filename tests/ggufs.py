"""Tiny models as GGUF files, written with the `gguf` package as llama.cpp's converter writes them.

model = tiny_model("qwen2", vocab_size=len(TOKENS))
write_gguf(tmp_path / "tiny.gguf", model)
"""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor, nn
from transformers.convert_slow_tokenizer import bytes_to_unicode

gguf = pytest.importorskip(
    "gguf", reason="GGUF files need the package gguf: pip install 'hiedit[models]'"
)
pytest.importorskip("accelerate", reason="transformers reads GGUF files only beside accelerate")

# A byte-level vocabulary: two control tokens, every byte, a few merges.
_CONTROL = ["<|endoftext|>", "<|im_end|>"]
MERGES = ["t h", "Ġ th", "Ġth e", "i s", "Ġ is", "o f", "Ġ of", "Ġ F", "r a"]
TOKENS = [*_CONTROL, *bytes_to_unicode().values(), *(m.replace(" ", "") for m in MERGES)]

# By our name for a part, llama.cpp's.
_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(path: Path, model: nn.Module, architecture: str | None = None, split="qwen2"):
    """``model`` (Llama or Qwen2, with ``vocab_size=len(TOKENS)``) as a GGUF file in float32.

    architecture: what the file calls it, if not what it is. split: how the text is split, as
    ``tokenizer.ggml.pre`` says it.
    """
    c, family = model.config, model.config.model_type
    writer = gguf.GGUFWriter(str(path), architecture or family)
    writer.add_name("tiny")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(TOKENS)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if t in _CONTROL else kinds.NORMAL for t in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, value in model.state_dict().items():
        writer.add_tensor(_name(name), _as_stored(name, value, c, family).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _name(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, _, layer, *part, kind = name.split(".")
    return f"blk.{layer}.{_PARTS['.'.join(part)]}.{kind}"


def _as_stored(name: str, value: Tensor, c, family: str) -> Tensor:
    """llama.cpp has the two halves of a rotated pair side by side in Llama's q and k."""
    heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
    for part, count in heads.items():
        if family == "llama" and part in name:
            rows = value.shape[0] // count
            pairs = value.reshape(count, 2, rows // 2, *value.shape[1:])
            return pairs.swapaxes(1, 2).reshape(value.shape)
    return value
