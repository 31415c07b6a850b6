"""Attention keys and values before the positions that an edit acts on, computed once per edit.

An edit at the subject's last token changes what comes from there on. What stands before it (the
contexts, the beginning of the prompt) is computed once, with the committed weights, and later
passes of the edit compute the rest alone. The shifts on trial act on the earlier positions too,
by the little that the protection leaves of them; that is not seen here, so an edit is checked on
its whole prompt before it counts as done.

Shapes: ``N`` sequences, ``S`` positions, ``T`` tokens that are no padding, ``t`` those from the
edited position on, ``h`` heads, ``d`` their size.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hiedit.backbone.packing import Packing
from hiedit.types import TokenBatch


class Past:
    """The part of one batch that later passes take as given.

    batch: the whole sequences. first: int64 [N], the column from which on each is computed anew.
    rest: the batch with attention at the columns from ``first`` on alone. positions: [N, S].
    index: int64 [t], the rest among the T tokens. memory: by layer, attention's keys and values
    of what comes before, zero at the rest, in the form that the layer's attention works with.
    """

    def __init__(self, batch: TokenBatch, first: Tensor, positions: Tensor):
        self.batch, self.positions = batch, positions
        columns = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        later = batch.attention.bool() & (columns >= first[:, None])
        self.rest = dataclasses.replace(batch, attention=later.long())
        self.whole = Packing(batch.attention.bool())
        self.index = self.whole.rank[later]
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}
        self.rotary: tuple[Tensor, Tensor] | None = None  # cos and sin [T, d], of all tokens
        self.states: Tensor | None = None  # [T, H], what enters the layers, where that is kept

    def before(self) -> Packing:
        """The tokens before, as they are computed once; their attention is recorded here."""
        earlier = self.batch.attention.bool() & ~self.rest.attention.bool()
        return _Part(earlier, self, self.whole.rank[earlier], records=True)

    def after(self) -> Packing:
        """The rest, whose attention sees the tokens before."""
        return _Part(self.rest.attention.bool(), self, self.index, records=False)


class _Part(Packing):
    """A part of the tokens of a ``Past``."""

    def __init__(self, where: Tensor, past: Past, index: Tensor, records: bool):
        super().__init__(where)
        self.past, self.records, self.places = past, records, index

    @property
    def visible(self) -> Tensor:
        return self.mask if self.records else self.past.whole.mask

    @property
    def bounds(self) -> Tensor:
        return self.starts if self.records else self.past.whole.starts

    def with_past(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """[N, h, S, d]: keys and values of the whole sequences."""
        return self._joined(layer, key, value)

    def whole_tokens(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, ...]:
        """q, k, v [t, .] and rotary cos, sin -> the same of all T tokens; zero queries before."""
        tokens = self.past.whole.tokens
        spread = [x.new_zeros(tokens, x.shape[1]).index_copy(0, self.places, x) for x in (q, k, v)]
        keys, values = self._joined(layer, *spread[1:])
        return (q, k, v, cos, sin) if self.records else (spread[0], keys, values, *self.past.rotary)

    def own(self, out: Tensor) -> Tensor:
        """[t, .] of what attention gave for all tokens."""
        return out if self.records else out.index_select(0, self.places)

    def _joined(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.records:
            self.past.memory[layer] = key.detach(), value.detach()
            return key, value
        before = self.past.memory.get(layer)
        return (key, value) if before is None else (key + before[0], value + before[1])
