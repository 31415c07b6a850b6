"""A padded batch as one row of tokens, so that no layer computes padding.

Sequences of one reward differ in length, and a quarter of a padded batch is padding. Everything in
a decoder layer but attention treats tokens one by one, so the model is given all ``T`` tokens as
a single row; attention alone puts them back into ``N`` padded sequences, attends within each, and
packs the result again. The numbers are those of the padded batch up to the order of sums.

Shapes: ``N`` sequences, ``S`` positions, ``T`` tokens that are no padding, ``h`` heads, ``d`` their
size, ``H`` hidden size.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hiedit.backbone import fused

NAME, ORIGINAL = "hiedit_packed", "sdpa"
# Known to be right: attention goes through transformers' interface, positions are rotary.
SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


class Packing:
    """The places of a padded batch's tokens.

    where: bool [N, S], False at padding (on either side). index: int64 [T], the tokens' places in
    the flat padded batch.
    """

    def __init__(self, where: Tensor):
        self.where = where
        self.index = where.reshape(-1).nonzero().squeeze(-1)

    @property
    def tokens(self) -> int:
        return self.index.numel()

    @cached_property
    def rows(self) -> Tensor:
        """int64 [T]: the sequence of each token."""
        return self.index // self.where.shape[1]

    @cached_property
    def starts(self) -> Tensor:
        """int64 [N + 1]: the first token of each sequence, T last."""
        return torch.nn.functional.pad(self.where.sum(1).cumsum(0), (1, 0))

    @cached_property
    def rank(self) -> Tensor:
        """int64 [N, S]: where each position stands among the tokens; of padding, meaningless."""
        return self.where.reshape(-1).cumsum(0).view_as(self.where) - 1

    @cached_property
    def mask(self) -> Tensor:
        """bool [N, 1, S, S]: causal, keys that are padding left out; padding attends to itself,
        as a row without any key would be NaN."""
        size = self.where.shape[1]
        causal = torch.ones(size, size, dtype=torch.bool, device=self.where.device).tril()
        own = torch.eye(size, dtype=torch.bool, device=self.where.device)
        return ((causal & self.where[:, None, :]) | own)[:, None]

    @property
    def visible(self) -> Tensor:
        """bool [N, 1, S, S]: what attention may look at."""
        return self.mask

    @property
    def bounds(self) -> Tensor:
        """int64 [N + 1]: ``starts`` of the sequences that attention sees."""
        return self.starts

    def with_past(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Padded keys and values [N, h, S, d] with those of tokens that are not computed now."""
        return key, value

    def whole_tokens(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, ...]:
        """The same for packed ones [T, .]: q, k, v, cos and sin of all that attention sees."""
        return q, k, v, cos, sin

    def own(self, out: Tensor) -> Tensor:
        """Select of attention's outputs [T, .] those of the tokens that are computed now."""
        return out

    def pad(self, x: Tensor) -> Tensor:
        """[1, h, T, d] -> [N, h, S, d], zero at padding."""
        _, h, t, d = x.shape
        flat = x.transpose(1, 2).reshape(t, h * d)
        padded = flat.new_zeros(self.where.numel(), h * d).index_copy(0, self.index, flat)
        return padded.view(*self.where.shape, h, d).transpose(1, 2)

    def pack(self, x: Tensor) -> Tensor:
        """[N, S, ...] -> [1, T, ...]."""
        return x.flatten(0, 1).index_select(0, self.index)[None]


def possible(model: nn.Module, attention: Tensor) -> bool:
    """Tell whether a batch with this ``attention`` [N, S] can be packed."""
    window = getattr(model.config, "sliding_window", None)
    return (
        type(model).__name__ in SUPPORTED
        and model.config._attn_implementation == ORIGINAL
        and (window is None or attention.shape[1] <= window)
    )


def is_sharded(model: nn.Module) -> bool:
    """Tell whether ZeRO-3 holds the parameters: it follows the order in which modules are called,
    which must then be the same at every pass."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


def pays(model: nn.Module, attention: Tensor) -> bool:
    """Tell whether a batch with this ``attention`` [N, S] can be packed, and gains by it: there is
    padding to leave out, or fused operators to use."""
    return possible(model, attention) and (fused.usable(model) or not bool(attention.all()))


@contextlib.contextmanager
def packed(model: nn.Module, packing: Packing, keep: Tensor | None = None) -> Iterator[None]:
    """Have ``model`` take the tokens of ``packing`` as one row, and its last layer's MLP
    computes those at ``keep`` (int64, among the T) alone; None means all."""
    inner, config, previous = model.model, model.config, model.config._attn_implementation
    _ACTIVE.stack.append(packing)
    config._attn_implementation = NAME
    handles = [] if keep is None else _only(inner.layers[-1].mlp, keep)
    fast = fused.usable(model)
    try:
        with fused.fused(inner.layers, inner.norm, packing) if fast else _PLAIN:
            yield
    finally:
        for handle in handles:
            handle.remove()
        config._attn_implementation = previous
        _ACTIVE.stack.pop()


def active() -> Packing | None:
    """The packing of the forward pass that this thread is running."""
    return _ACTIVE.stack[-1] if _ACTIVE.stack else None


class _Active(threading.local):
    def __init__(self):
        self.stack: list[Packing] = []


def _only(module: nn.Module, keep: Tensor):
    """Hooks by which ``module`` sees the tokens ``keep`` and gives zero at the others."""

    def before(_, args):
        return (args[0].index_select(1, keep), *args[1:])

    def after(_, args, out):
        full = out.new_zeros(1, active().tokens, out.shape[-1])
        return full.index_copy(1, keep, out)

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask=None, **kwargs):
    """Attention within each packed sequence; query, key, value: [1, h, T, d]."""
    packing = active()
    query, key, value = (packing.pad(x) for x in (query, key, value))
    key, value = packing.with_past(module.layer_idx, key, value)
    attend = ALL_ATTENTION_FUNCTIONS[ORIGINAL]
    out, weights = attend(module, query, key, value, packing.visible, **kwargs)
    return packing.pack(out), weights


_ACTIVE = _Active()
_PLAIN = contextlib.nullcontext()
AttentionInterface.register(NAME, _attention)
