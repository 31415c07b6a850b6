"""Packed batches and the fused operators behind them, against plain PyTorch and the plain model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import pad_batch, random_sequences, tiny_model
from torch.testing import assert_close

from hiedit import extension
from hiedit.backbone import fused, packing
from hiedit.backbone.fused import PackedAttention, RMSNorm, SiluMul
from hiedit.backbone.model import Backbone
from hiedit.backbone.packing import Packing
from hiedit.backbone.signals import Probe

built = pytest.mark.skipif(
    not extension.load().available, reason=f"hiedit._C: {extension.load().reason}"
)
TIGHT = {"rtol": 2e-6, "atol": 2e-6}
LENGTHS = (1, 7, 8, 9, 0, 20, 33)  # below, at and above the width of a vector; an empty one


def attention_inputs(h: int, hk: int, d: int):
    generator = torch.Generator().manual_seed(d)
    tokens = sum(LENGTHS)
    q, k, v = (
        torch.randn(tokens, n * d, generator=generator, requires_grad=True) for n in (h, hk, hk)
    )
    angle = torch.randn(tokens, d, generator=generator)  # halves that differ: nothing assumes else
    starts = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0))
    return q, k, v, angle.cos(), angle.sin(), starts, d**-0.5


@built
@pytest.mark.parametrize("heads", [(4, 4, 64), (6, 2, 32), (2, 1, 16)], ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_attention_and_its_gradients(heads, count, threads):
    threads(count)
    inputs = attention_inputs(*heads)
    out, wanted = PackedAttention.apply(*inputs), fused.attention_reference(*inputs)
    assert_close(out, wanted, **TIGHT)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs[:3], grad),
        torch.autograd.grad(wanted, inputs[:3], grad),
        strict=True,
    ):
        assert_close(ours, theirs, rtol=1e-5, atol=5e-6)


@built
def test_attention_of_large_scores():
    """The largest score is taken out before exp: nothing overflows, nothing is NaN."""
    q, k, v, cos, sin, starts, _ = attention_inputs(2, 2, 16)
    inputs = (q, k, v, cos, sin, starts, 50.0)
    out = PackedAttention.apply(*inputs)
    assert_close(out, fused.attention_reference(*inputs), rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(bool(g.isfinite().all()) for g in grads)


@built
def test_norm_and_gate():
    generator = torch.Generator().manual_seed(1)
    x, u = (torch.randn(3, 5, 24, generator=generator) * 3 for _ in range(2))
    x, u = x.requires_grad_(), u.requires_grad_()
    weight, grad = torch.randn(24, generator=generator), torch.randn(3, 5, 24, generator=generator)
    pairs = [
        (RMSNorm.apply(x, weight, 1e-5), fused.rms_norm_reference(x, weight, 1e-5), (x,)),
        (SiluMul.apply(x, u), F.silu(x) * u, (x, u)),
    ]
    for ours, theirs, inputs in pairs:
        assert_close(ours, theirs, **TIGHT)
        mine, wanted = (torch.autograd.grad(y, inputs, grad) for y in (ours, theirs))
        assert_close(mine, wanted, rtol=1e-5, atol=5e-6)


@built
def test_gate_far_from_zero_and_what_is_not_finite():
    x = torch.tensor([-1e4, -90.0, -30.0, 30.0, 90.0, 1e4, float("nan"), 0.0])
    out = SiluMul.apply(x, torch.ones(8))
    assert_close(out, F.silu(x), rtol=1e-6, atol=1e-30, equal_nan=True)
    norm = RMSNorm.apply(torch.full((1, 8), float("nan")), torch.ones(8), 1e-6)
    assert bool(norm.isnan().all())


@built
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.silu_mul(torch.ones(7), torch.ones(7)), "multiple of 8"),
        (lambda t: t.silu_mul(torch.ones(8), torch.ones(16)), "one shape"),
        (lambda t: t.rms_norm(torch.ones(2, 8), torch.ones(16), 1e-6), "got"),
        (lambda t: t.rms_norm(torch.ones(8, 2).T, torch.ones(8), 1e-6), "contiguous"),
        (lambda t: t.rms_norm(torch.ones(2, 8).double(), torch.ones(8), 1e-6), "float32"),
    ],
    ids=["odd", "shapes", "weight", "strides", "dtype"],
)
def test_inputs_are_checked(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.hiedit)


@built
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({5: torch.tensor([0, 5])}, "starts must rise from 0 to T"),
        ({5: torch.tensor([0, 70, 60, 78])}, "starts must rise"),
        ({3: torch.ones(78, 8), 4: torch.ones(78, 8)}, "multiple of 16"),
        ({1: torch.ones(78, 3 * 16), 2: torch.ones(78, 3 * 16)}, "divides q and k"),
        ({2: torch.ones(77, 32)}, "got"),
    ],
    ids=["short", "falling", "head", "group", "tokens"],
)
def test_attention_inputs_are_checked(change, message):
    inputs = [x.detach() if torch.is_tensor(x) else x for x in attention_inputs(2, 2, 16)]
    for place, value in change.items():
        inputs[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hiedit.packed_attention(*inputs)


# ---- whole models


def answers_and_signals(model, batch):
    backbone = Backbone(model, None)
    signals = Probe(backbone, batch, 3, "all").signals()
    return backbone.answers(batch), signals


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_packed_equals_padded(architecture, side, backend, monkeypatch):
    """Logits, keys and gradients of a batch; ``eager`` attention is never packed."""
    monkeypatch.setenv("HIEDIT_BACKEND", backend)
    batch = pad_batch(random_sequences(), side)
    size = {"hidden_size": 64, "head_dim": 16, "sliding_window": None}
    plain = tiny_model(architecture, attn_implementation="eager", **size)
    model = tiny_model(architecture, attn_implementation="sdpa", **size)
    assert packing.pays(model, batch.attention) and not packing.pays(plain, batch.attention)
    assert fused.usable(model) == (backend == "auto" and extension.load().available)
    (ours, mine), (theirs, wanted) = (answers_and_signals(m, batch) for m in (model, plain))
    assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    for name in wanted.keys:
        assert_close(mine.keys[name], wanted.keys[name], rtol=1e-5, atol=1e-5)
        assert_close(mine.grads[name], wanted.grads[name], rtol=1e-4, atol=1e-6)


def test_long_sequences_of_a_sliding_window_stay_padded():
    batch = pad_batch(random_sequences(), "left")
    length = batch.ids.shape[1]
    for window, packs in ((length - 1, False), (length, True), (None, True)):
        model = tiny_model("mistral", sliding_window=window)
        assert packing.pays(model, batch.attention) is packs


def test_nothing_of_it_stays_in_the_model():
    model = tiny_model("llama")
    before = model.config._attn_implementation
    batch = pad_batch(random_sequences(), "left")
    with pytest.raises(ZeroDivisionError):
        with packing.packed(model, Packing(batch.attention.bool())):
            raise ZeroDivisionError
    assert model.config._attn_implementation == before and packing.active() is None
    assert not any("forward" in vars(module) for module in model.modules())


def test_where_tokens_are():
    where = torch.tensor([[False, True, True], [True, True, False], [False, False, True]])
    one = Packing(where)
    assert one.tokens == 5 and one.rows.tolist() == [0, 0, 1, 1, 2]
    assert one.starts.tolist() == [0, 2, 4, 5] and one.rank[where].tolist() == list(range(5))
    x = torch.arange(5.0).view(1, 1, 5, 1)
    padded = one.pad(x)
    assert padded[:, 0, :, 0].tolist() == [[0, 0, 1], [2, 3, 0], [0, 0, 4]]
    assert torch.equal(one.pack(padded.transpose(1, 2)), x.transpose(1, 2))
