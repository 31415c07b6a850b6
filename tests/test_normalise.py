"""Running statistics of signals: per module, pooled, and what must not upset them."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from hiedit.backbone.normalise import RunningNorm


def test_running_norm_equals_numpy_over_batches():
    norm = RunningNorm(2, 3, clamp=None).double()
    draw = np.random.default_rng(0)
    offset = np.array([[[1e3, 0.0, -5.0]], [[0.1, 2.0, 3.0]]])
    batches = [draw.normal(size=(2, t, 3)) * [2.0, 0.5, 10.0] + offset for t in (1, 4, 0, 7, 30)]
    for batch in batches:
        norm.observe(torch.from_numpy(batch))
    seen = np.concatenate(batches, axis=1)
    mean, std = seen.mean(1), seen.std(1, ddof=1)
    assert norm.count == seen.shape[1]
    np.testing.assert_allclose(norm.mean, mean, rtol=1e-9)
    np.testing.assert_allclose(norm.std, std, rtol=1e-6)
    wanted = (seen - mean[:, None]) / std[:, None]
    np.testing.assert_allclose(norm(torch.from_numpy(seen)), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clamp", [8.0, 1.5, None], ids=str)
def test_running_norm_clamps_to_standard_deviations(clamp):
    norm = RunningNorm(1, 2, clamp)
    norm.observe(torch.randn(1, 1000, 2, generator=torch.Generator().manual_seed(0)))
    out = norm(torch.tensor([[[100.0, -100.0], [0.1, 0.2]]]))
    assert out.abs().max() > 90 if clamp is None else out.abs().max() == clamp
    assert (out[0, 1].abs() < 0.5).all()


def test_pooled_a_module_that_hardly_moves_is_not_blown_up():
    x = torch.randn(3, 200, 1, generator=torch.Generator().manual_seed(0)) + 5.0
    x[2] = -27.0  # always the same there
    alone, pooled = RunningNorm(3, 1), RunningNorm(3, 1, pooled=True)
    for norm in (alone, pooled):
        norm.observe(x)
    wanted = (x.var(1).mean(0)).sqrt()
    assert_close(pooled.std, wanted.expand(3, 1))
    assert_close(pooled(x), (x - x.mean(1, keepdim=True)) / wanted)
    little = torch.full((3, 1, 1), -26.9)
    assert float(alone(little)[2]) == 8.0 and 0 < float(pooled(little)[2]) < 0.2


def test_running_norm_is_the_identity_before_data():
    x = torch.full((2, 3, 4), 1e6)
    norm = RunningNorm(2, 4, clamp=8.0)
    assert torch.equal(norm(x), x) and torch.equal(norm.std, torch.ones(2, 4))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_running_norm_ignores_a_batch_that_is_not_finite(value):
    norm = RunningNorm(2, 3)
    norm.observe(torch.randn(2, 5, 3))
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    bad = torch.randn(2, 5, 3)
    bad[1, 2, 0] = value
    norm.observe(bad)
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_running_norm_keeps_a_dead_feature_finite():
    norm = RunningNorm(1, 2, clamp=None)
    x = torch.stack([torch.linspace(-1, 1, 9), torch.zeros(9)], -1)[None]
    norm.observe(x)
    assert norm(x).isfinite().all()
    everything_dead = RunningNorm(1, 2, clamp=8.0)
    everything_dead.observe(torch.zeros(1, 4, 2))
    assert everything_dead(torch.ones(1, 1, 2)).isfinite().all()


def test_running_norm_goes_on_where_its_state_dict_ended():
    first, second = RunningNorm(2, 3), RunningNorm(2, 3)
    first.observe(torch.randn(2, 5, 3))
    second.load_state_dict(first.state_dict())
    more = torch.randn(2, 5, 3)
    first.observe(more)
    second.observe(more)
    assert torch.equal(first(more), second(more))
