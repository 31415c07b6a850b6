"""Hidden states below the lowest editable module, computed once per sequence and kept.

Edits change editable modules alone, so what enters the lowest decoder layer that holds one is a
function of the tokens: no edit, no shift on trial and no reset can change it. Whoever changes
the weights of a lower layer in place (nothing here does) is noticed by the parameters' version
counters, and the cache starts again; a change through ``parameter.data`` is not.

Shapes: ``N`` sequences, ``S`` positions, ``T`` tokens that are no padding, ``H`` hidden size.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from hiedit.backbone.bytecache import ByteCache
from hiedit.backbone.packing import Packing, is_sharded, packed, pays
from hiedit.types import TokenBatch

DEFAULT_BYTES = 256 << 20
# Known to be right: rotary positions inside the layers, nothing done to the embeddings before
# them (Gemma scales them) and no layer that reads its own index in the stack.
SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class Prefix:
    """The lower part of one model, ``model.model.layers[:depth]``, behind a bounded cache.

    names: the editable modules. limit: bytes kept at most; 0 switches the cache off, as does an
    architecture that is not in ``SUPPORTED`` (then ``depth`` is 0). What is kept stands on the
    model's device in its dtype.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], limit: int = DEFAULT_BYTES):
        self.model, self.cache = model, ByteCache(limit)
        self.depth = _depth(model, names) if limit else 0
        below = model.model.layers[: self.depth] if self.depth else []
        self._lower = [p for layer in below for p in layer.parameters()]
        self._lower += [model.model.embed_tokens.weight] if self.depth else []
        self._seen = self._state()

    def states(self, batch: TokenBatch, positions: Tensor) -> Tensor:
        """[N, S, H]: what enters layer ``depth``, without a graph; zero at padding."""
        where = batch.attention.bool()
        flat = self.tokens(batch, positions)
        if bool(where.all()):
            return flat.view(*where.shape, -1)
        states = flat.new_zeros(*where.shape, flat.shape[-1])
        states[where] = flat
        return states

    def tokens(self, batch: TokenBatch, positions: Tensor) -> Tensor:
        """[T, H]: the same at all that is no padding, sequence after sequence."""
        if self._seen != (now := self._state()):
            self.cache.clear()
            self._seen = now
        where = batch.attention.bool()
        keys = [
            tuple(i for i, kept in zip(*row, strict=True) if kept)
            for row in zip(batch.ids.tolist(), batch.attention.tolist(), strict=True)
        ]
        found = {key: self.cache.get(key) for key in keys}
        new = {key: row for row, key in enumerate(keys) if found[key] is None}
        if new:  # of equal sequences the last one is computed
            rows = torch.tensor(list(new.values()), device=where.device)
            # Columns that are padding in all new rows are not worth a forward pass.
            used = where[rows].any(0)
            ids, attention, places = (
                x[rows][:, used] for x in (batch.ids, batch.attention, positions)
            )
            for key, row in zip(new, self._run(ids, attention, places), strict=True):
                found[key] = row.clone()  # of its own, or it would keep all of them alive
                self.cache.put(key, found[key])
        return torch.cat([found[key] for key in keys])

    @contextlib.contextmanager
    def upper(self) -> Iterator[None]:
        """Have the model consist of the layers from ``depth`` on and take ``states`` as
        ``inputs_embeds``; restored afterwards, also on an error."""
        inner = self.model.model
        layers = inner.layers
        inner.layers = layers[self.depth :]
        try:
            yield
        finally:
            inner.layers = layers

    @torch.no_grad()
    def _run(self, ids: Tensor, attention: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Return, by sequence, [S_i, H] of the lower layers, without the final norm."""
        inner, where = self.model.model, attention.bool()
        layers, norm = inner.layers, inner.norm
        inner.layers, inner.norm = layers[: self.depth], nn.Identity()
        try:
            if pays(self.model, attention):
                packing = Packing(where)
                with packed(self.model, packing):
                    ids, positions = packing.pack(ids), packing.pack(positions)
                    out = inner(input_ids=ids, position_ids=positions, use_cache=False)
                return out.last_hidden_state[0].split(where.sum(1).tolist())
            out = inner(
                input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False
            )
            return tuple(row[kept] for row, kept in zip(out.last_hidden_state, where, strict=True))
        finally:
            inner.layers, inner.norm = layers, norm

    def _state(self) -> tuple[tuple[int, int], ...]:
        return tuple((p.data_ptr(), p._version) for p in self._lower)


def _depth(model: nn.Module, names: Iterable[str]) -> int:
    """Return how many layers lie below the lowest editable module; 0 where that is not known."""
    if type(model).__name__ not in SUPPORTED:
        return 0
    places = [_LAYER.match(name) for name in names]
    if not places or not all(places):
        return 0
    depth = min(int(place[1]) for place in places)
    kinds = getattr(model.config, "layer_types", None)
    if kinds and len(set(kinds)) > 1:  # the mask of a layer goes by its index
        return 0
    return 0 if is_sharded(model) else depth
