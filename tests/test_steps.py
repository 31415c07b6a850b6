"""Steps relative to what a module gives out, so that no default depends on the model."""

from __future__ import annotations

import pytest
import torch
from models import tiny_model, tiny_tokenizer
from test_updater import NAMES, SHAPES, dense, float_mask, make_signals, make_updater, one_edit
from torch.testing import assert_close

from hiedit.backbone.model import Backbone, at_tokens
from hiedit.backbone.moments import typical_power
from hiedit.backbone.normalise import stack_group
from hiedit.config import MethodConfig, from_mapping
from hiedit.data.tokens import encode
from hiedit.methods import build_method, editor_of, editor_tensors
from hiedit.updaters.solvers import least_squares, outer_product, protected_least_squares

pytestmark = pytest.mark.usefixtures("one_thread")

ETA = 0.3  # of make_updater
SOLVERS = {
    "outer-raw": {"solver": "outer", "normalise": "none"},
    "outer-running": {"solver": "outer", "normalise": "running"},
    "least-squares": {"solver": "least_squares", "normalise": "running", "lam": 1e-12},
    "least-squares-raw": {"solver": "least_squares", "normalise": "none", "lam": 1e-12},
}
solvers = pytest.mark.parametrize("setting", SOLVERS.values(), ids=SOLVERS)
kinds = pytest.mark.parametrize("learned", [False, True], ids=["closed-form", "hypernetwork"])
POWER = {n: torch.tensor(2.0 + 3 * o) for n, (_, o) in SHAPES.items()}
PRESERVE = [("Rome lies in", "Italy"), ("Lima is in", "Peru"), ("Ink is", "blue")]


def relative(learned=False, **setting):
    updater = make_updater(learned=learned, awake=learned, step="relative", **setting)
    assert updater.wants_power == (setting["solver"] != "protected")
    if updater.wants_power:
        updater.fit_power(POWER)
    return updater


def longest(shift, keys) -> float:
    """Of the changes of the outputs at ``keys`` [T, I]."""
    return float((keys @ shift.detach().T).norm(dim=-1).max())


@solvers
@kinds
def test_an_edits_longest_change_is_a_share_of_a_typical_output(setting, learned):
    """However long keys and gradients are, and whatever the batch."""
    updater = relative(learned, **setting)
    signals = make_signals(edit=(0, 0, 1))  # no more tokens than features: all can be had
    for e in range(2):
        alone = one_edit(signals, e)
        shifts = updater(alone, float_mask([[1] * 5]))
        for name in NAMES:
            wanted = ETA * float(POWER[name].sqrt())
            assert longest(dense(shifts, name), alone.keys[name]) == pytest.approx(wanted, 1e-4)
    together = updater(signals, float_mask([[1] * 5] * 2))
    for name in NAMES:
        for e in range(2):
            keys = signals.keys[name][signals.edit == e]
            shift = together[name]
            if setting["solver"] == "outer":  # what other edits' shifts do there is not its own
                own = signals.edit == e
                found = longest(shift.B[:, own] @ shift.A[own], keys)
            else:
                found = longest(shift.dense(), keys)
            assert found == pytest.approx(ETA * float(POWER[name].sqrt()), 1e-4), (name, e)


@pytest.mark.parametrize("name", ["outer-raw", "outer-running"])
@kinds
def test_relative_edits_in_a_batch_equal_one_by_one(name, learned):
    updater, signals = relative(learned, **SOLVERS[name]), make_signals()
    mask = [[1, 0, 1, 0, 0], [1, 1, 0, 0, 1], [0, 1, 0, 0, 1]]
    together = updater(signals, float_mask(mask))
    alone = [updater(one_edit(signals, e), float_mask(mask[e : e + 1])) for e in range(3)]
    for module in NAMES:
        assert_close(dense(together, module), sum(dense(shifts, module) for shifts in alone))


@pytest.mark.parametrize("name", ["outer-raw", "least-squares-raw"])
def test_a_step_does_not_depend_on_the_size_of_the_gradients(name):
    updater, signals = relative(**SOLVERS[name]), make_signals(edit=(0, 0, 1))
    larger = {n: g * 1000 for n, g in signals.grads.items()}
    louder = type(signals)(signals.keys, larger, signals.edit, signals.loss, signals.confidence)
    one, other = (updater(s, float_mask([[1] * 5] * 2)) for s in (signals, louder))
    for module in NAMES:
        assert_close(dense(one, module), dense(other, module))


@solvers
def test_gradients_reach_every_parameter_of_a_relative_step(setting):
    updater = relative(learned=True, **(setting | {"lam": 0.5}))
    shifts = updater(make_signals(), float_mask([[1] * 5] * 3))
    squares = {n: shift.dense().square().sum() for n, shift in shifts.items()}
    sum(squares.values()).backward()
    idle = {"log_lam"} if setting["solver"] == "outer" else set()
    for name, parameter in updater.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached != (name.rsplit(".", 1)[-1] in idle), name
    for group in updater.groups:  # the shift is proportional to eta, its square to eta squared
        wanted = torch.stack([2 * squares[n] for n in group.names])
        assert_close(group.log_eta.grad, wanted.detach())


def test_unit_steps_are_what_they_were_bit_for_bit():
    signals, edit = make_signals(), make_signals().edit
    protected = make_updater(solver="protected", step="unit")
    for group in protected.groups:
        keys, grads = stack_group(signals, group.names)
        live = torch.ones(keys.shape[:2], dtype=torch.bool)
        eta, lam = group.log_eta.exp(), group.log_lam.exp()
        length = grads.norm(dim=-1)
        most = length.new_zeros(len(length), 3)
        most = most.scatter_reduce(1, edit.expand_as(length), length, "amax")[:, edit]
        unit = grads * (group.protection.power.sqrt()[:, None] / most.clamp(min=1e-20))[:, :, None]
        given = keys, -eta[:, None, None] * unit, lam, keys @ group.protection.precision, live
        for mine, wanted in zip(
            group.solve(keys, grads, live, edit), protected_least_squares(*given), strict=True
        ):
            assert torch.equal(mine, wanted)
    other = make_updater(solver="protected", step="relative")
    ones = float_mask([[1] * 5] * 3)
    for name, shift in protected(signals, ones).items():  # a protected step was relative already
        assert torch.equal(shift.dense(), other(signals, ones)[name].dense())


@pytest.mark.parametrize("step", ["unit", "gradient"])
def test_other_steps_know_no_power(step):
    for solver in ("outer", "least_squares"):
        updater = make_updater(solver=solver, normalise="none", step=step)
        assert not updater.wants_power
        assert not any("power" in name for name in updater.state_dict())
        for group in updater.groups:
            keys, grads = stack_group(make_signals(), group.names)
            live = torch.ones(keys.shape[:2], dtype=torch.bool)
            eta, lam = group.log_eta.exp(), group.log_lam.exp()
            if solver == "outer":
                wanted = outer_product(keys, grads, eta)
            else:
                wanted = least_squares(keys, keys, grads, eta, lam, live)
            found = group.solve(keys, grads, live, make_signals().edit)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_method_measures_what_typical_outputs_are_and_keeps_it():
    names = ["model.layers.{0-1}.mlp.gate_proj", "model.layers.1.mlp.down_proj"]
    backbone = Backbone(tiny_model("llama", num_hidden_layers=2), tiny_tokenizer(), names)
    updater = {"solver": "outer", "normalise": "running", "step": "relative"}
    config = from_mapping(MethodConfig, {"updater": updater})
    made = build_method(backbone, config, preserve=PRESERVE)
    batch = encode(backbone.tokenizer, PRESERVE, padding_side="left")
    where = batch.attention.bool()
    with backbone.capture() as (_, outputs):
        backbone.answers(batch)
    found = typical_power(backbone, [batch.select(torch.tensor([i])) for i in range(3)])
    for group in made.rollout.updater.groups:
        for name, power in zip(group.names, group.power, strict=True):
            sizes = at_tokens(outputs[name].detach(), where, batch.attention).square().sum(-1)
            assert_close(power, sizes.median())
            assert_close(found[name], sizes.median(), rtol=1e-4, atol=1e-6)
    again = editor_of(backbone, config, editor_tensors(made), seed=1).rollout.updater
    for one, other in zip(made.rollout.updater.groups, again.groups, strict=True):
        assert torch.equal(one.power, other.power) and bool((one.power != 1).all())
