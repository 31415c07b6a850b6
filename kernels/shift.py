"""The functional shift, ``y = out + ((x A^T) * scale) B^T``, forward and backward.

For batches in which each sequence has its own edit or mask: A and B hold the rank rows of all
edits, one below the other, and ``scale`` says which sequence uses which. PyTorch computes all rank
rows for all tokens and multiplies most of them by zero; here a tile of tokens and rank rows whose
scales are all zero is neither computed nor are its factors read. Two products, as h is narrow: the
first contracts the features, the second adds to ``out`` without a product of its size in between.
The backward pass is two such products more, and two over the tokens for A and B, without atomics:
the same numbers every time.

Sums are in another order than PyTorch's, so results agree to rounding, not bit for bit.

Shape letters: ``T`` tokens, ``N`` sequences, ``I``/``O`` in and out features, ``D`` either of them,
``r`` rank rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from hiedit_kernels import reference
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
# Tokens and rank rows per tile; fixed, as the map of live tiles depends on them.
BT, BR = (16, 16) if INTERPRETED else (64, 32)
_CONFIGS = [
    triton.Config({"BD": features}, num_warps=warps, num_stages=stages)
    for features, warps, stages in [(32, 4, 2), (64, 4, 3), (128, 4, 3), (128, 8, 2)]
]
_KEY = ["D", "R"]


@triton.jit
def _down(x, w, scale, rows, live, raw, h, T, R, D, w_rank, w_feature,
          SCALED: tl.constexpr, BY_ROW: tl.constexpr, RAW: tl.constexpr, ACC: tl.constexpr,
          BT: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """raw = x w^T, h = raw * scale: x [T, D], w [R, D] with strides, h and raw [T, R]. A tile that
    is not live is zero."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    token, rank = t.to(tl.int64)[:, None], r.to(tl.int64)
    inside = (t < T)[:, None] & (r < R)[None, :]
    # tl.full, not tl.zeros: what Triton itself wrote in Triton is not interpreted if something
    # imported Triton before its variable was set.
    sums = tl.full((BT, BR), 0.0, ACC)
    if tl.load(live + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) != 0:
        for first in range(0, D, BD):
            d = first + tl.arange(0, BD)
            left = tl.load(x + token * D + d[None, :],
                           mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)  # fmt: skip
            right = tl.load(w + rank[None, :] * w_rank + d.to(tl.int64)[:, None] * w_feature,
                            mask=(d < D)[:, None] & (r < R)[None, :], other=0.0)  # fmt: skip
            sums = tl.dot(left, right, sums, input_precision="ieee")
    places = token * R + rank[None, :]
    if RAW:
        tl.store(raw + places, sums.to(raw.dtype.element_ty), mask=inside)
    if SCALED:
        row = tl.load(rows + t, mask=t < T, other=0) if BY_ROW else t.to(tl.int64) * 0
        factor = tl.load(scale + row[:, None] * R + rank[None, :], mask=inside, other=0.0)
        sums = sums * factor.to(ACC)
    tl.store(h + places, sums.to(h.dtype.element_ty), mask=inside)


@triton.jit
def _up(h, w, base, live, out, T, R, D, w_rank, w_feature,
        BASED: tl.constexpr, ACC: tl.constexpr,
        BT: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """out = base + h w: h [T, R], w [R, D] with strides, base and out [T, D]."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    token, feature = t.to(tl.int64)[:, None], d.to(tl.int64)[None, :]
    inside = (t < T)[:, None] & (d < D)[None, :]
    sums = tl.full((BT, BD), 0.0, ACC)
    blocks = (R + BR - 1) // BR
    for block in range(0, blocks):
        if tl.load(live + tl.program_id(0) * blocks + block) != 0:
            r = block * BR + tl.arange(0, BR)
            left = tl.load(h + token * R + r[None, :],
                           mask=(t < T)[:, None] & (r < R)[None, :], other=0.0)  # fmt: skip
            right = tl.load(w + r.to(tl.int64)[:, None] * w_rank + feature * w_feature,
                            mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)  # fmt: skip
            sums = tl.dot(left, right, sums, input_precision="ieee")
    places = token * D + feature
    if BASED:
        sums += tl.load(base + places, mask=inside, other=0.0).to(ACC)
    tl.store(out + places, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _over_tokens(h, x, live, out, T, R, D, ACC: tl.constexpr,
                 BT: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """out = h^T x: h [T, R], x [T, D], out [R, D]; the tokens in order."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    sums = tl.full((BR, BD), 0.0, ACC)
    for block in range(0, (T + BT - 1) // BT):
        if tl.load(live + block * tl.num_programs(0) + tl.program_id(0)) != 0:
            t = block * BT + tl.arange(0, BT)
            token = t.to(tl.int64)
            left = tl.load(h + token[None, :] * R + r[:, None],
                           mask=(r < R)[:, None] & (t < T)[None, :], other=0.0)  # fmt: skip
            right = tl.load(x + token[:, None] * D + d[None, :],
                            mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)  # fmt: skip
            sums = tl.dot(left, right, sums, input_precision="ieee")
    places = r.to(tl.int64)[:, None] * D + d[None, :]
    inside = (r < R)[:, None] & (d < D)[None, :]
    tl.store(out + places, sums.to(out.dtype.element_ty), mask=inside)


def _kernel(function):
    """Tuned on a GPU; none of the three writes what it reads, so trying tiles is harmless."""
    return function if INTERPRETED else triton.autotune(_CONFIGS, key=_KEY)(function)


_down, _up, _over_tokens = _kernel(_down), _kernel(_up), _kernel(_over_tokens)


class _Shape:
    """What the launches of one call share: sizes, which tiles are live, who uses which scale."""

    def __init__(self, x: Tensor, A: Tensor, scale: Tensor | None, rows: Tensor | None, skip: bool):
        self.tokens, self.rank = len(x), len(A)
        self.scale, self.rows = scale, rows
        self.constants = {
            "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32, "BT": BT, "BR": BR,
            "enable_fp_fusion": True,
        }  # fmt: skip
        if INTERPRETED:
            self.constants["BD"] = 32
        self.live = self._live_tiles(x.device, skip)

    def _live_tiles(self, device, skip: bool) -> Tensor:
        """int8 [T / BT, r / BR], rounded up: 0 where no token uses any rank row of the tile."""
        down, across = -(-self.tokens // BT), -(-self.rank // BR)
        if not skip or self.scale is None:
            return torch.ones(down, across, dtype=torch.int8, device=device)
        used = torch.nn.functional.pad(self.scale != 0, (0, across * BR - self.rank))
        used = used.view(-1, across, BR).any(-1)
        if self.rows is None:
            return used.to(torch.int8).expand(down, across).contiguous()
        used = torch.nn.functional.pad(used[self.rows], (0, 0, 0, down * BT - self.tokens))
        return used.view(down, BT, across).any(1).to(torch.int8)

    def down(self, x: Tensor, w: Tensor, raw: bool) -> tuple[Tensor, Tensor]:
        """(x w^T, the same times scale), [T, r] each; the first is the second unless ``raw``."""
        h = x.new_empty(self.tokens, self.rank)
        first = torch.empty_like(h) if raw else h
        none = self.scale is None
        _down[(*self.live.shape,)](
            x, w, h if none else self.scale, self.live if self.rows is None else self.rows,
            self.live, first, h, self.tokens, self.rank, x.shape[1], *w.stride(), SCALED=not none,
            BY_ROW=self.rows is not None, RAW=raw, **self.constants)  # fmt: skip
        return first, h

    def up(self, h: Tensor, w: Tensor, base: Tensor | None) -> Tensor:
        """base + h w, [T, D]."""
        out = h.new_empty(self.tokens, w.shape[1])
        grid = lambda meta: (-(-self.tokens // BT), -(-w.shape[1] // meta["BD"]))  # noqa: E731
        _up[grid](h, w, h if base is None else base, self.live, out, self.tokens, self.rank,
                  w.shape[1], *w.stride(), BASED=base is not None, **self.constants)  # fmt: skip
        return out

    def over_tokens(self, h: Tensor, x: Tensor) -> Tensor:
        """h^T x, [r, D]."""
        out = x.new_empty(self.rank, x.shape[1])
        grid = lambda meta: (-(-self.rank // BR), -(-x.shape[1] // meta["BD"]))  # noqa: E731
        _over_tokens[grid](h, x, self.live, out, self.tokens, self.rank, x.shape[1],
                           **self.constants)  # fmt: skip
        return out


class _Shifted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, x, A, B, scale, rows):
        # The derivative by a scale of zero is not zero: with one wanted, every tile is computed.
        by_scale = scale is not None and ctx.needs_input_grad[4]
        shape = _Shape(x, A, scale, rows, skip=not by_scale)
        raw, h = shape.down(x, A, raw=by_scale)
        ctx.save_for_backward(x, A, B, h, raw if by_scale else None)
        ctx.shape = shape
        return shape.up(h, B.T, out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, A, B, h, raw = ctx.saved_tensors
        shape, needs = ctx.shape, ctx.needs_input_grad
        grad = grad.contiguous()
        d_raw, d_h = shape.down(grad, B.T, raw=raw is not None)
        return (
            grad if needs[0] else None,
            shape.up(d_h, A, None) if needs[1] else None,
            shape.over_tokens(d_h, x) if needs[2] else None,
            shape.over_tokens(h, grad).T if needs[3] else None,
            None if raw is None else _by_scale(raw * d_raw, shape),
            None,
        )


def _by_scale(products: Tensor, shape: _Shape) -> Tensor:
    """[N, r]: the sums over each sequence's tokens, as a product, which is deterministic."""
    if shape.rows is None:
        return products.sum(0, keepdim=True).to(shape.scale.dtype)
    sequences = torch.arange(len(shape.scale), device=products.device)
    belongs = (shape.rows == sequences[:, None]).to(products.dtype)
    return (belongs @ products).to(shape.scale.dtype)


def shifted(
    out: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """``out + ((x A^T) * scale) B^T``, differentiable by all but ``rows``, once.

    Args:
        out: [..., O], what the layer gave without the shift. x: [..., I], its input.
        A: [r, I], B: [O, r], any strides; all four of one dtype: bf16, fp16, fp32 or fp64.
        scale: None, [r], or [N, r], one row per sequence, in any floating dtype. Where no gradient
            by it is wanted, tiles of tokens and rank rows in which it is 0 cost nothing.
        rows: int64, one per token: the row of ``scale``. None for an [N, r] scale means that x is
            [N, S, I] or [N * S, I], S tokens of each sequence after the other.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
        RuntimeError: for tensors on the CPU without Triton's interpreter, and for bf16 with it.
    """
    rows = _check(out, x, A, B, scale, rows)
    if A.shape[0] == 0 or x.numel() == 0:
        return reference.shifted(out, x, A, B, scale, rows)
    flat_out, flat_x = (t.reshape(-1, t.shape[-1]).contiguous() for t in (out, x))
    if scale is not None:
        scale = scale.reshape(-1, A.shape[0]).contiguous()
    return _Shifted.apply(flat_out, flat_x, A, B, scale, rows).view_as(out)


def _check(out, x, A, B, scale, rows) -> Tensor | None:
    """The row of ``scale`` of each token, None where there is one for all."""
    if A.dim() != 2 or B.dim() != 2 or len(A) != B.shape[1]:
        raise ValueError(
            f"A must be [r, I] and B [O, r], got A {tuple(A.shape)} and B {tuple(B.shape)}"
        )
    if x.shape[-1] != A.shape[1] or out.shape != (*x.shape[:-1], len(B)):
        raise ValueError(
            f"x must be [..., {A.shape[1]}] and out [..., {len(B)}], "
            f"got {tuple(x.shape)} and {tuple(out.shape)}"
        )
    if len(found := {out.dtype, x.dtype, A.dtype, B.dtype}) > 1:
        raise ValueError(f"out, x, A and B must have one dtype, got {sorted(map(str, found))}")
    if not x.is_cuda and not INTERPRETED:
        raise RuntimeError(
            f"the Triton kernels work on GPUs and x is on {x.device}: use "
            "hiedit_kernels.reference.shifted, or set TRITON_INTERPRET=1 before the start"
        )
    if INTERPRETED and x.dtype == torch.bfloat16:
        raise RuntimeError("Triton's interpreter multiplies the bits of bf16: use another dtype")
    if scale is None or scale.dim() == 1:
        if scale is not None and len(scale) != len(A):
            raise ValueError(f"scale must be [{len(A)}], got {tuple(scale.shape)}")
        return None
    tokens = x.numel() // x.shape[-1]
    if scale.dim() != 2 or scale.shape[1] != len(A):
        raise ValueError(f"scale must be [r] or [N, r], r = {len(A)}, got {tuple(scale.shape)}")
    if rows is None:
        if len(scale) == 0 or tokens % len(scale):
            raise ValueError(f"{tokens} tokens are not {len(scale)} sequences of one length")
        each = tokens // len(scale)
        return torch.arange(len(scale), device=x.device).repeat_interleave(each)
    if rows.numel() != tokens or rows.dtype != torch.int64:
        raise ValueError(f"rows must be int64 [{tokens}], got {rows.dtype} {tuple(rows.shape)}")
    return rows.reshape(-1)
