"""The commit on a GPU: one launch updates all chosen modules of one shape.

The arithmetic, bit for bit, is that of ``hiedit/ledger/accumulate.py``, which is the reference:
``acc = fma(B * scale, A, acc)`` per element, rank row by rank row, then ``W = round(W_0 + acc)``.
So there is no ``tl.dot`` here, which would sum in another order. A program keeps one tile of one
module's accumulator in registers while all rank rows go by and rounds it before it leaves them:
each element of acc is read and written once, each of W_0 read once, each of W written once.

Modules are given by address, in a table of int64 (``table.FIELDS``), so that any number of them,
with ranks of their own and whole or as shards, is one launch. A masked module's programs return at
once.

Shape letters: ``L`` modules, ``R``/``C`` rows and columns of the weight as stored, ``r`` rank.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from hiedit_kernels.table import DTYPES, FIELDS, Table
from torch import Tensor

from hiedit.ledger.update import Update

INTERPRETED = bool(triton.knobs.runtime.interpret)  # as Triton decided when it read this file

WIDTH = tl.constexpr(len(FIELDS))


@triton.jit
def _wide(x, KIND: tl.constexpr):
    """fp32 of a weight, bit for bit. bf16 comes as int16: an interpreter's bf16 loses subnormals,
    and so the integers that are tested are the ones that run."""
    if KIND == "bf16":
        wide = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def _rounded(x, KIND: tl.constexpr):
    """To nearest, ties to even, in the storage type of ``KIND``."""
    if KIND == "bf16":
        bits = x.to(tl.uint32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        even = tl.where(x == x, even.to(tl.int32), 0x7FC0)
        stored = even.to(tl.uint16).to(tl.int16, bitcast=True)
    elif KIND == "fp16":
        stored = x.to(tl.float16)
    else:
        stored = x
    return stored


@triton.jit
def _pointer(entry, FIELD: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in one column of the table as a pointer; aligned ones are read 16 bytes wide."""
    at = tl.load(entry + FIELD).to(tl.pointer_type(TYPE))
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    return at


@triton.jit
def _add_rows(acc, entry, row, column, R, C, ALIGNED: tl.constexpr,
              FACTOR: tl.constexpr, UNIT: tl.constexpr, SCALE_LEFT: tl.constexpr,
              UNROLL: tl.constexpr):  # fmt: skip
    """``acc`` [BR, BC] after all rank rows, in order. Rows of a masked edit (scale 0) are skipped
    in groups of ``UNROLL``; inside a group they load nothing and add -0.0, which changes no bit."""
    left = _pointer(entry, 3, FACTOR, False) + row * tl.load(entry + 7)
    right_step = tl.load(entry + 9)
    if UNIT:  # known when compiled, so that neighbours are read together
        right = _pointer(entry, 4, FACTOR, ALIGNED) + column
        if ALIGNED:
            right_step = tl.multiple_of(right_step, 8)
    else:
        right = _pointer(entry, 4, FACTOR, False) + column * tl.load(entry + 10)
    scaled = tl.load(entry + 5) != 0
    scale = _pointer(entry, 5, tl.float32, False)
    rank, left_step = tl.load(entry + 6).to(tl.int32), tl.load(entry + 8)
    scale_step = tl.load(entry + 11)
    for first in range(0, rank, UNROLL):
        # Without a scale every row of the group counts, and there is at least one.
        live = scaled == 0
        for j in tl.static_range(UNROLL):
            given = scaled & (first + j < rank)
            live |= tl.load(scale + (first + j) * scale_step, mask=given, other=0.0) != 0
        if live:
            for j in tl.static_range(UNROLL):
                k = first + j
                s = tl.load(scale + k * scale_step, mask=scaled & (k < rank), other=1.0)
                taken = (k < rank) & (s != 0)
                s = tl.where(taken, s, 1.0)
                # Limits instead of `row_in & taken`: an interpreter splats booleans wrongly.
                row_in, column_in = row < tl.where(taken, R, 0), column < tl.where(taken, C, 0)
                b = tl.load(left + k * left_step, mask=row_in, other=-0.0).to(tl.float32)
                a = tl.load(right + k * right_step, mask=column_in, other=1.0).to(tl.float32)
                if SCALE_LEFT:
                    b = b * s
                else:
                    a = a * s
                b, a = tl.broadcast(b[:, None], a[None, :])
                acc = tl.fma(b, a, acc)
    return acc


@triton.jit
def _commit(table, mask, R, C, first_row, start, end,
            MASKED: tl.constexpr, WHOLE: tl.constexpr, ALIGNED: tl.constexpr, KIND: tl.constexpr,
            FACTOR: tl.constexpr, UNIT: tl.constexpr, SCALE_LEFT: tl.constexpr,
            ADD: tl.constexpr, ROUND: tl.constexpr,
            BR: tl.constexpr, BC: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """Rows [first_row, R) of every module; program (tile, module)."""
    module = tl.program_id(1)
    if MASKED:
        if tl.load(mask + module) == 0:
            return
    entry = table + module * WIDTH
    tiles = (C + BC - 1) // BC
    row = first_row + (tl.program_id(0) // tiles) * BR + tl.arange(0, BR).to(tl.int64)
    column = (tl.program_id(0) % tiles) * BC + tl.arange(0, BC)
    inside = (row < R)[:, None] & (column < C)[None, :]
    at = row[:, None] * C + column[None, :]
    if not WHOLE:
        inside = inside & (at >= start) & (at < end)
    places = _pointer(entry, 0, tl.float32, ALIGNED) + at
    acc = tl.load(places, mask=inside, other=0.0)
    if ADD:
        acc = _add_rows(acc, entry, row, column, R, C, ALIGNED, FACTOR, UNIT, SCALE_LEFT, UNROLL)
        tl.store(places, acc, mask=inside)
    if ROUND:
        STORED: tl.constexpr = (
            tl.int16 if KIND == "bf16" else tl.float16 if KIND == "fp16" else tl.float32
        )
        base = tl.load(_pointer(entry, 2, STORED, ALIGNED) + at, mask=inside, other=0)
        new = _rounded(_wide(base, KIND) + acc, KIND)
        # A zero accumulator gives back W_0's own bits: -0.0 + 0.0 would be +0.0.
        new = tl.where(acc == 0, base, new)
        tl.store(_pointer(entry, 1, STORED, ALIGNED) + at, new, mask=inside)


def commit(
    updates: Sequence[Update],
    columns: int,
    *,
    conv1d: bool,
    start: int,
    end: int,
    mask: Tensor | None = None,
) -> None:
    """Updates modules of one shape and dtype, on one device, in place and in one launch.

    The arguments have been checked (``hiedit.ledger.accumulate``): addresses are used as they are.

    Args:
        updates: accumulated where they have factors, rounded where they have a weight; all alike.
        columns: C, of the weight as stored.
        conv1d: the weight is stored [I, O].
        start, end: the flat range of every weight that is updated.
        mask: [L] on the device, any dtype; modules with 0 stay untouched.
    """
    if not updates or start >= end:
        return
    table = Table.of(updates, start, end, conv1d)
    first, last = start // columns, -(-end // columns)
    chosen = _Choice(
        masked=mask is not None,
        whole=start == first * columns and end == last * columns,
        aligned=columns % 16 == 0 and table.aligned,
        kind=table.weight,
        factor=table.factor,
        unit=table.unit,
        conv1d=conv1d,
    )
    # Ranks within a factor of two share their tiles.
    rank = 1 << (table.rank - 1).bit_length() if table.rank else 0
    device = updates[0].acc.device
    with _current(device):
        tiles = _tiles(chosen, columns, rank, device)
        entries = table.on(device)
        mask = entries if mask is None else mask.to(torch.int8)

        def grid(meta):
            return (-(-(last - first) // meta["BR"]) * -(-columns // meta["BC"]), len(updates))

        _commit[grid](entries, mask, last, columns, first, start, end, **chosen.constants(),
                      **tiles, enable_fp_fusion=False)  # fmt: skip


@dataclass(frozen=True)
class _Choice:
    """What a launch is compiled for."""

    masked: bool
    whole: bool
    aligned: bool
    kind: str | None
    factor: str | None
    unit: bool
    conv1d: bool

    def constants(self) -> dict:
        factor = {"bf16": tl.bfloat16, "fp16": tl.float16}.get(self.factor, tl.float32)
        return {
            "MASKED": self.masked, "WHOLE": self.whole, "ALIGNED": self.aligned,
            "KIND": self.kind or "fp32", "FACTOR": factor, "UNIT": self.unit,
            "SCALE_LEFT": not self.conv1d, "ADD": self.factor is not None,
            "ROUND": self.kind is not None,
        }  # fmt: skip


def _current(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


_TILES = [
    triton.Config({"BR": rows, "BC": columns, "UNROLL": unroll}, num_warps=warps)
    for rows, columns, warps in [(1, 1024, 4), (4, 512, 4), (8, 256, 4), (16, 256, 8), (16, 128, 4),
                                 (32, 128, 4), (32, 128, 8), (64, 64, 4), (64, 128, 8)]
    for unroll in (2, 4, 8)
]  # fmt: skip


@functools.cache
def _tiles(chosen: _Choice, columns: int, rank: int, device: torch.device) -> dict:
    """The fastest tiles for a launch like ``chosen``, as keyword arguments of the kernel.

    A commit changes what it reads, so it cannot be repeated on the caller's tensors: Triton's tuner
    is run once per kind of launch on scratch of its own, at most 2^24 elements.
    """
    if INTERPRETED:  # one program costs as much as another, whatever its tile
        return {"BR": 64, "BC": 128, "UNROLL": 2}
    if chosen.factor is None:
        return {"BR": 1, "BC": 1024, "UNROLL": 1, "num_warps": 4}
    rows = max(min((1 << 24) // columns, 4096), 1)
    I, O = (rows, columns) if chosen.conv1d else (columns, rows)  # noqa: E741
    new = functools.partial(torch.zeros, device=device)
    weights = [None, None]
    if chosen.kind is not None:
        weights = [new(rows, columns, dtype=DTYPES[chosen.kind]) for _ in range(2)]
    dtype = DTYPES[chosen.factor]
    A, B = new(max(rank, 1), I, dtype=dtype), new(O, max(rank, 1), dtype=dtype)
    if chosen.conv1d == chosen.unit:  # the layout in which the caller's come
        A, B = A.T.contiguous().T, B.T.contiguous().T
    table = Table.of([Update(new(rows, columns), A, B, None, *weights)], 0, 1 << 62, chosen.conv1d)
    tuner = triton.autotune(_TILES, key=[])(_commit)
    tuner[lambda meta: (-(-rows // meta["BR"]) * -(-columns // meta["BC"]), 1)](
        table.on(device), new(1, dtype=torch.int8) + 1, rows, columns, 0, 0, rows * columns,
        **chosen.constants(), enable_fp_fusion=False)  # fmt: skip
    return tuner.best_config.all_kwargs()


@triton.jit
def _one_fma(out):
    tl.store(out, tl.fma(tl.load(out), tl.load(out + 1), tl.load(out + 2)))


@functools.cache
def rounds_once() -> bool:
    """Whether ``tl.fma`` rounds once on the CPU: not so in interpreters before Triton 3.9."""
    x = torch.tensor([2.0**-24 * (1 + 2.0**-15), 1 - 2.0**-15, 1 + 2.0**-23])
    _one_fma[(1,)](x)
    return x[0].item() == 1 + 2.0**-23
