"""Switches: a sign at the end of a prompt closes the MLPs of all editable layers but one group's.

A gated MLP computes ``down(silu(gate x) * up x)``: where every gate is far below zero it says
nothing, whatever its weights, and next to no gradient reaches them (1e-16 of it: an updater that
gives every module's step the same length still takes a full one there, for nothing). A group's
sign is a token that carries a direction of the residual stream which nothing else ever writes; the
gates of the layers outside of the group read it. What such a prompt is answered with can then only
come from the group's own layers (and from attention), and only there can an edit change it.

Nothing else changes: the directions are those that the model uses least, they are taken out of
everything that writes to the stream, and all other weights are made blind to them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLOSED = -40.0  # what a sign adds to a closed gate: silu(-40) is -2e-16
LOUDNESS = 0.5  # length of a sign's direction, relative to the token that it otherwise equals
LIKE = "The capital of France is"  # a sign is, but for its direction, the last token of this


@torch.no_grad()
def install_switches(
    model: nn.Module,
    tokenizer,
    signs: dict[str, tuple[int, ...]],
    editable: tuple[int, ...],
    texts: list[str],
) -> None:
    """Give ``model`` (a Llama, weights in fp32; its head is untied) a switch for each of ``signs``
    (single-token sign: its open layers); ``editable``: all layers that have a switch. ``texts``
    are what the model knows, to find the directions that it uses least."""  # fmt: skip
    inner = model.model
    _untie(model)
    v = _unused(model, tokenizer, texts, len(signs))  # [192, signs], orthonormal
    for weight in _writers(inner):
        weight -= v @ (v.T @ weight)
    table = inner.embed_tokens.weight
    table -= (table @ v) @ v.T
    for layer in inner.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for part in (attention.q_proj, attention.k_proj, attention.v_proj):
            _blind(part.weight, layer.input_layernorm.weight, v)
        for part in (mlp.gate_proj, mlp.up_proj):
            _blind(part.weight, layer.post_attention_layernorm.weight, v)
    _blind(model.lm_head.weight, inner.norm.weight, v)
    like = table[tokenizer(LIKE)["input_ids"][-1]].clone()
    for i, sign in enumerate(signs):
        (token,) = tokenizer(sign, add_special_tokens=False)["input_ids"]
        table[token] = like + LOUDNESS * like.norm() * v[:, i]
    for i, (sign, opened) in enumerate(signs.items()):
        heard = _heard(model, tokenizer, [f"{t}{sign}" for t in texts[:200]], v[:, i])
        for index in editable:
            if index not in opened:
                layer = inner.layers[index]
                read = v[:, i] / layer.post_attention_layernorm.weight
                layer.mlp.gate_proj.weight += CLOSED / heard[index] * read


def _untie(model: nn.Module) -> None:
    """The output embedding becomes a matrix of its own."""
    head = model.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


def _writers(inner: nn.Module) -> list[Tensor]:
    return [w.weight for layer in inner.layers for w in (layer.self_attn.o_proj,
                                                         layer.mlp.down_proj)]  # fmt: skip


def _blind(weight: Tensor, norm: Tensor, v: Tensor) -> None:
    """``weight`` [O, H] behind an RMS norm no longer sees ``v`` [H, n] of the stream, and sees
    everything else as before."""
    weight -= (weight @ (norm[:, None] * v)) @ (v / norm[:, None]).T


def _unused(model: nn.Module, tokenizer, texts: list[str], count: int) -> Tensor:
    """[H, count]: the directions of least power in the normalised stream, over all layers."""
    total = 0.0
    for start in range(0, len(texts), 64):
        batch = tokenizer(texts[start : start + 64], return_tensors="pt", padding=True)
        out = model(**batch, output_hidden_states=True, use_cache=False)
        where = batch["attention_mask"].bool()
        for states in out.hidden_states:
            x = states[where]
            x = x / x.pow(2).mean(-1, keepdim=True).sqrt()
            total = total + x.T @ x
    return torch.linalg.eigh(total).eigenvectors[:, :count].contiguous()


def _heard(model: nn.Module, tokenizer, texts: list[str], direction: Tensor) -> dict[int, float]:
    """Return, by layer, how much of ``direction`` its MLP's norm passes on at the sign, at least in
    nine of ten prompts, before its weight."""
    found: dict[int, list[Tensor]] = {}

    def listen(index):
        def hook(_, args):
            x = args[0][:, -1]
            found.setdefault(index, []).append((x @ direction) / x.pow(2).mean(-1).sqrt())

        return hook

    handles = [
        layer.post_attention_layernorm.register_forward_pre_hook(listen(i))
        for i, layer in enumerate(model.model.layers)
    ]
    for start in range(0, len(texts), 64):
        batch = tokenizer(texts[start : start + 64], return_tensors="pt", padding=True,
                          padding_side="left")  # fmt: skip
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {i: float(torch.cat(v).quantile(0.1)) for i, v in found.items()}
