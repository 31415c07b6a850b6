"""Fused operators between the matrix products of a Llama-like layer, on the CPU in fp32.

``csrc/layers.cpp`` computes rotary attention over packed sequences, RMSNorm and SiLU * up, each
with its gradient, in one pass over memory. The functions here bind it to autograd and, for the
time of one forward pass, to the modules of a Llama, Mistral or Qwen2; the ``*_reference``
functions define the results. Weights are frozen: only activations have gradients.

Shapes: ``T`` tokens of all sequences, ``N`` sequences, ``h`` query heads, ``hk`` key heads, ``d``
their size, ``H`` hidden size.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from hiedit import extension


class PackedAttention(Function):
    """Causal attention within each sequence, rotary positions applied to q and k on the way.

    q: [T, h d]. k, v: [T, hk d]. cos, sin: [T, d]. starts: int64 [N + 1], where each sequence
    begins, T last. Returns [T, h d].
    """

    @staticmethod
    def forward(ctx, q, k, v, cos, sin, starts, scale):
        out, lse = torch.ops.hiedit.packed_attention(q, k, v, cos, sin, starts, scale)
        ctx.save_for_backward(q, k, v, cos, sin, starts, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grads = torch.ops.hiedit.packed_attention_backward(
            grad.contiguous(), *ctx.saved_tensors, ctx.scale
        )
        return *grads, None, None, None, None


class RMSNorm(Function):
    """``w * x / sqrt(mean(x^2) + eps)`` over the last dimension; w: [H]."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        y, r = torch.ops.hiedit.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return torch.ops.hiedit.rms_norm_backward(grad.contiguous(), *ctx.saved_tensors), None, None


class SiluMul(Function):
    """``silu(gate) * up``."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return torch.ops.hiedit.silu_mul(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return torch.ops.hiedit.silu_mul_backward(grad.contiguous(), *ctx.saved_tensors)


def attention_reference(q, k, v, cos, sin, starts, scale) -> Tensor:
    """Return what ``PackedAttention`` computes, in PyTorch."""
    d = cos.shape[1]
    q, k, v = (x.view(len(x), -1, d) for x in (q, k, v))
    q, k = (x * cos[:, None] + _half_turn(x) * sin[:, None] for x in (q, k))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    parts = []
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        one, keys, values = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        scores = one @ keys.mT * scale
        future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        parts.append((scores.masked_fill(future, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(parts).flatten(1)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return what ``RMSNorm`` computes, in PyTorch."""
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def _half_turn(x: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat([-right, left], -1)


def usable(model: nn.Module) -> bool:
    """Tell whether the fused operators can stand in for ``model``'s own (its class is known to be
    one of ``packing.SUPPORTED``). ``HIEDIT_BACKEND=reference`` switches them off."""
    config = model.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    first = next(model.parameters())
    return (
        os.environ.get("HIEDIT_BACKEND") != "reference"
        and first.device.type == "cpu"
        and first.dtype == torch.float32
        and size % 16 == 0
        and config.hidden_size % 8 == 0
        and config.intermediate_size % 8 == 0
        and config.hidden_act in ("silu", "swish")
        and extension.load().available
    )


@contextlib.contextmanager
def fused(layers: nn.ModuleList, norm: nn.Module, packing) -> Iterator[None]:
    """Have ``layers`` and ``norm`` take all sequences as one row [1, T, H] and compute with the
    fused operators. packing: of the tokens (``packing.Packing``)."""
    patched: list[nn.Module] = []

    def patch(module: nn.Module, forward) -> None:
        module.forward = forward  # the instance's own, until it is removed again
        patched.append(module)

    try:
        for layer in layers:
            patch(layer.input_layernorm, _norm(layer.input_layernorm))
            patch(layer.post_attention_layernorm, _norm(layer.post_attention_layernorm))
            patch(layer.self_attn, _attention(layer.self_attn, packing))
            patch(layer.mlp, _mlp(layer.mlp))
        if hasattr(norm, "variance_epsilon"):
            patch(norm, _norm(norm))
        yield
    finally:
        for module in patched:
            vars(module).pop("forward", None)


def _norm(module: nn.Module):
    return lambda x: RMSNorm.apply(x.contiguous(), module.weight, module.variance_epsilon)


def _mlp(module: nn.Module):
    def forward(x: Tensor) -> Tensor:
        gate, up = module.gate_proj(x), module.up_proj(x)
        return module.down_proj(SiluMul.apply(gate.contiguous(), up.contiguous()))

    return forward


def _attention(module: nn.Module, packing):
    def forward(hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_):
        parts = (module.q_proj, module.k_proj, module.v_proj)
        q, k, v = (part(hidden_states)[0].contiguous() for part in parts)
        cos, sin = (x[0].contiguous() for x in position_embeddings)
        seen = packing.whole_tokens(module.layer_idx, q, k, v, cos, sin)
        out = PackedAttention.apply(*seen, packing.bounds, module.scaling)
        return module.o_proj(packing.own(out)[None]), None

    return forward
