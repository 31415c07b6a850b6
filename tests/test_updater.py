"""The low level: the hypernetwork and the updater on synthetic signals."""

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

from hiedit.backbone.normalise import stack_group
from hiedit.config import UpdaterConfig
from hiedit.types import Signals
from hiedit.updaters.hypernetwork import Hypernetwork
from hiedit.updaters.memory import absorb_kept, keys_to_keep
from hiedit.updaters.updater import Updater

# Two shapes, interleaved: the order of a group is not the model's.
SHAPES = {"a": (6, 5), "b": (3, 8), "c": (6, 5), "d": (3, 8), "e": (6, 5)}
NAMES = list(SHAPES)
SETTINGS = {
    "outer-running": {"solver": "outer", "normalise": "running"},
    "outer-raw": {"solver": "outer", "normalise": "none"},
    "least-squares": {"solver": "least_squares", "normalise": "running"},
    "protected-unit": {"solver": "protected", "normalise": "none", "step": "unit"},
    "protected-gradient": {"solver": "protected", "normalise": "running", "step": "gradient"},
}
settings = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Matrices this small only wait for a second thread."""
    threads(1)


def groups():
    found = {}
    for name, shape in SHAPES.items():
        found.setdefault(shape, []).append(name)
    return found


def make_signals(edit=(0, 0, 0, 1, 1, 2), seed=0):
    """Float64 signals of ``max(edit) + 1`` edits, the magnitudes of modules far apart."""
    draw = torch.Generator().manual_seed(seed)
    tokens, edits = len(edit), max(edit) + 1

    def normal(features, size):
        return size * torch.randn(tokens, features, generator=draw, dtype=torch.float64)

    return Signals(
        keys={n: normal(i, 3.0 ** (j - 2)) for j, (n, (i, _)) in enumerate(SHAPES.items())},
        grads={n: normal(o, 0.1**j) for j, (n, (_, o)) in enumerate(SHAPES.items())},
        edit=torch.tensor(edit),
        loss=torch.ones(edits),
        confidence=torch.zeros(edits),
    )


def one_edit(signals, e):
    """The signals of edit ``e`` alone."""
    rows = signals.edit == e
    return Signals(
        {n: k[rows] for n, k in signals.keys.items()},
        {n: g[rows] for n, g in signals.grads.items()},
        torch.zeros(int(rows.sum()), dtype=torch.int64),
        signals.loss[:1],
        signals.confidence[:1],
    )


def poison(signals, name, what="keys", value=torch.nan):
    """Signals in which one number of module ``name`` is not finite."""
    changed = dict(getattr(signals, what))
    changed[name] = changed[name].clone()
    changed[name][0, 1] = value
    return dataclasses.replace(signals, **{what: changed})


def make_updater(seed=0, learned=False, awake=False, **setting):
    """Float64; statistics observed and protection fitted. awake: its blocks do something."""
    torch.manual_seed(seed)
    kind = "hypernetwork" if learned else "closed_form"
    updater = Updater(NAMES, groups(), UpdaterConfig(kind=kind, rank=4, eta=0.3, **setting))
    updater.double()
    for step in range(3):
        updater.observe(make_signals(seed=100 + step))
    updater.fit_protection(
        {
            n: ((x := torch.randn(30, i, dtype=torch.float64)).T @ x / 30, torch.tensor(2.0 + o))
            for n, (i, o) in SHAPES.items()
        }
    )
    if awake:
        with torch.no_grad():
            for group in updater.groups:
                for block in group.net.blocks:
                    block.up.normal_(std=0.3)
                    block.shift.normal_(std=0.1)
    return updater


def dense(shifts, name):
    """[O, I] in float64, zero where the module is left out."""
    if name in shifts:
        return shifts[name].dense()
    i, o = SHAPES[name]
    return torch.zeros(o, i, dtype=torch.float64)


# Hypernetwork


def awake_network(per_module, modules=3):
    torch.manual_seed(1)
    net = Hypernetwork(modules, 6, 5, rank=4, blocks=2, per_module=per_module).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


sharing = pytest.mark.parametrize("per_module", [False, True], ids=["shared", "per-module"])


@sharing
def test_hypernetwork_is_the_identity_at_the_start(per_module):
    net = Hypernetwork(3, 6, 5, rank=4, blocks=3, per_module=per_module)
    keys, grads = torch.randn(3, 4, 6), torch.randn(3, 4, 5)
    new_keys, new_grads = net(keys, grads)
    assert torch.equal(new_keys, keys) and torch.equal(new_grads, grads)


@sharing
def test_hypernetwork_in_a_batch_equals_a_loop_over_modules(per_module):
    net = awake_network(per_module)
    keys, grads = torch.randn(3, 4, 6).double(), torch.randn(3, 4, 5).double()
    new_keys, new_grads = net(keys, grads)
    for m in range(3):
        x = torch.cat([keys[m], grads[m]], -1)
        for block in net.blocks:
            own = m if per_module else 0
            hidden = (x @ block.down[own] + block.bias[own]).relu()
            x = x + block.scale[m] * (hidden @ block.up[own]) + block.shift[m]
        assert_close(torch.cat([new_keys[m], new_grads[m]], -1), x)


@sharing
def test_gradients_reach_every_parameter_of_the_hypernetwork(per_module):
    net = awake_network(per_module)
    keys, grads = torch.randn(3, 9, 6).double(), torch.randn(3, 9, 5).double()
    sum(out.square().sum() for out in net(keys, grads)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    copies = 3 if per_module else 1
    assert net.blocks[0].down.shape[0] == copies and net.blocks[0].scale.shape[0] == 3


def test_first_gradient_reaches_the_output_side_of_a_fresh_network():
    net = Hypernetwork(3, 6, 5, rank=4, blocks=2)
    sum(out.square().sum() for out in net(torch.randn(3, 9, 6), torch.randn(3, 9, 5))).backward()
    assert all(block.up.grad.abs().sum() > 0 for block in net.blocks)
    assert all(block.shift.grad.abs().sum() > 0 for block in net.blocks)


# Updater


@settings
@pytest.mark.parametrize("learned", [False, True], ids=["closed-form", "fresh-network"])
def test_shift_of_one_edit_equals_a_loop_over_modules(setting, learned):
    """The formulas of the solvers, module by module, on dense matrices; a hypernetwork that has
    learned nothing yet is the closed form."""
    updater = make_updater(learned=learned, **setting)
    signals = make_signals(edit=(0, 0, 0))
    shifts = updater(signals, torch.ones(1, 5, dtype=torch.float64))
    eta, lam, config = 0.3, updater.config.lam, updater.config
    for group in updater.groups:
        for m, name in enumerate(group.names):
            keys, grads = signals.keys[name], signals.grads[name]
            k, g = keys, grads
            if config.normalise == "running":
                for_module = [x[None].expand(len(group.names), -1, -1) for x in (keys, grads)]
                k, g = group.key_norm(for_module[0])[m], group.grad_norm(for_module[1])[m]
            if config.solver == "outer":
                wanted = -eta * k.T @ g
            elif config.solver == "least_squares":
                d = -eta * (keys * k).sum(-1, keepdim=True) * g
                eye = torch.eye(len(keys.T), dtype=keys.dtype)
                wanted = torch.linalg.solve(keys.T @ keys + lam * eye, keys.T @ d)
            else:
                step = g if config.step == "gradient" else g / g.norm(dim=-1).max()
                if config.step == "unit":
                    step = step * group.protection.power[m].sqrt()
                p = group.protection.precision[m]
                gram = k @ p @ k.T
                ridge = lam * gram.diagonal().mean() * torch.eye(len(k), dtype=k.dtype)
                wanted = p @ k.T @ torch.linalg.solve(gram + ridge, -eta * step)
            assert_close(shifts[name].dense(), wanted.T, rtol=1e-6, atol=1e-9, msg=name)


MASK = [[1, 0, 1, 0, 0], [1, 1, 0, 0, 1], [0, 1, 0, 0, 1]]  # no edit touches d


def float_mask(rows=MASK, **kwargs):
    return torch.tensor(rows, dtype=torch.float64, **kwargs)


@pytest.mark.parametrize("name", ["outer-running", "outer-raw"])
@pytest.mark.parametrize("learned", [False, True], ids=["closed-form", "hypernetwork"])
def test_edits_in_a_batch_equal_one_by_one(name, learned):
    updater = make_updater(learned=learned, awake=learned, **SETTINGS[name])
    signals = make_signals()
    together = updater(signals, float_mask())
    alone = [updater(one_edit(signals, e), float_mask(MASK[e : e + 1])) for e in range(3)]
    for module in NAMES:
        assert_close(dense(together, module), sum(dense(shifts, module) for shifts in alone))


@settings
def test_edit_alone_on_its_modules_is_as_in_a_batch_of_its_own(setting):
    """Whatever the solver: where one edit alone touches a module, the others leave no trace."""
    updater = make_updater(**setting)
    signals = make_signals()
    mask = [[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]
    together = updater(signals, float_mask(mask))
    assert list(together) == ["a", "b", "c", "d"]
    for e in range(3):
        alone = updater(one_edit(signals, e), float_mask(mask[e : e + 1]))
        for module in alone:
            assert_close(dense(together, module), dense(alone, module), rtol=1e-9, atol=1e-12)


@settings
def test_modules_that_no_edit_touches_are_absent(setting):
    updater = make_updater(**setting)
    assert list(updater(make_signals(), float_mask())) == ["a", "b", "c", "e"]
    assert updater(make_signals(), torch.zeros(3, 5)) == {}


@settings
def test_every_gives_all_modules_in_the_models_order(setting):
    updater = make_updater(**setting)
    mask = float_mask()
    shifts = updater(make_signals(), mask, every=True)
    assert list(shifts) == NAMES
    assert (shifts["d"].scale == 0).all() and shifts["d"].B.abs().sum() > 0
    for column, name in enumerate(NAMES):
        assert torch.equal(shifts[name].scale, mask[make_signals().edit, column])


def test_gradient_of_the_mask_is_what_each_module_would_have_done():
    updater = make_updater(**SETTINGS["protected-unit"])
    signals = make_signals(edit=(0, 0, 0))
    mask = float_mask([[1, 0, 1, 0, 0]], requires_grad=True)
    shifts = updater(signals, mask, every=True)
    probe = {n: torch.randn(o, i, dtype=torch.float64) for n, (i, o) in SHAPES.items()}
    sum((shifts[n].dense() * probe[n]).sum() for n in NAMES).backward()
    whole = updater(signals, torch.ones(1, 5, dtype=torch.float64))
    wanted = torch.stack([(whole[n].dense() * probe[n]).sum() for n in NAMES])
    assert_close(mask.grad[0], wanted)


@settings
@pytest.mark.parametrize("what", ["keys", "grads"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_signals_that_are_not_finite_leave_their_module_out(setting, what, value):
    """And nothing else: neither the other shifts nor any gradient notices."""
    updater = make_updater(learned=True, awake=True, **setting)
    signals = make_signals(edit=(0, 0, 0))
    ones = torch.ones(1, 5, dtype=torch.float64)
    clean, shifts = (updater(s, ones) for s in (signals, poison(signals, "c", what, value)))
    assert list(shifts) == ["a", "b", "d", "e"]
    for name in shifts:
        assert_close(dense(shifts, name), dense(clean, name))
    sum(shift.dense().square().sum() for shift in shifts.values()).backward()
    for name, parameter in updater.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@settings
@sharing
def test_gradients_reach_every_parameter_of_the_updater(setting, per_module):
    updater = make_updater(learned=True, awake=True, per_module=per_module, **setting)
    shifts = updater(make_signals(), torch.ones(3, 5, dtype=torch.float64))
    sum(shift.dense().square().sum() for shift in shifts.values()).backward()
    idle = {"log_lam"} if setting["solver"] == "outer" else set()
    for name, parameter in updater.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached != (name.rsplit(".", 1)[-1] in idle), name


def test_kind_none_has_no_shift_and_closed_form_nothing_to_learn():
    updater = Updater(NAMES, groups(), UpdaterConfig(kind="none"))
    assert updater(make_signals(), float_mask()) == {} and not updater.learned
    closed = make_updater(**SETTINGS["protected-unit"])
    assert not closed.learned and not any(p.requires_grad for p in closed.parameters())


def test_energy_is_the_change_on_preserved_prompts():
    updater = make_updater(**SETTINGS["protected-unit"])
    signals = make_signals(edit=(0, 0, 0))
    shifts = updater(signals, float_mask([[1, 0, 1, 0, 1]]), every=True)
    del shifts["b"]
    energy = updater.energy(shifts)
    for group in updater.groups:
        guard = group.protection
        for m, name in enumerate(group.names):
            if name == "b":
                assert energy[NAMES.index(name)] == 0
                continue
            shift = shifts[name].dense()
            moment = guard.moment[m] * guard.unit[m]
            wanted = (shift @ moment @ shift.T).trace() / guard.power[m]
            assert_close(energy[NAMES.index(name)], wanted)
    assert (make_updater(**SETTINGS["outer-raw"]).energy(shifts) == 0).all()


def test_absorb_protects_the_modules_that_the_edit_touched_until_reset():
    updater = make_updater(**SETTINGS["protected-unit"])
    signals = make_signals(edit=(0, 0, 0))
    before = [group.protection.precision.clone() for group in updater.groups]
    updater.absorb(signals, float_mask([[1, 0, 0, 1, 0]]))
    for group, old in zip(updater.groups, before, strict=True):
        keys, _ = stack_group(signals, group.names)
        for m, name in enumerate(group.names):
            new = group.protection.precision[m]
            assert torch.equal(new, old[m]) != (name in "ad"), name
            if name in "ad":  # the edit's keys have become expensive
                wasted = (keys[m] @ new * keys[m]).sum(-1) / (keys[m] @ old[m] * keys[m]).sum(-1)
                assert (wasted < 1).all()
    updater.reset()
    for group, old in zip(updater.groups, before, strict=True):
        assert_close(group.protection.precision, old)


def test_an_edit_is_protected_in_all_modules_where_that_is_asked():
    signals = make_signals(edit=(0, 0, 1))
    mask = float_mask([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])  # the second edit touched nothing
    updater = make_updater(**SETTINGS["protected-unit"], absorb_in="all")
    wanted = make_updater(**SETTINGS["protected-unit"])
    again = make_updater(**SETTINGS["protected-unit"], absorb_in="all")
    updater.absorb(signals, mask)
    wanted.absorb(signals, float_mask([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]))
    kept = keys_to_keep(again, signals, mask)
    assert list(kept) == [n for g in again.groups for n in g.names]  # all, the first edit's tokens
    absorb_kept(again, kept)
    for group, other, third in zip(updater.groups, wanted.groups, again.groups, strict=True):
        assert torch.equal(group.protection.precision, other.protection.precision)
        assert_close(third.protection.precision, group.protection.precision)
    touched = make_updater(**SETTINGS["protected-unit"])
    assert list(keys_to_keep(touched, signals, mask)) == ["a"]


def test_a_method_that_edits_nothing_protects_nothing():
    """No precision matrices, two of every module, and no inverse at every reset."""
    for kind, protects in (("none", False), ("closed_form", True)):
        config = UpdaterConfig(kind=kind, solver="protected")
        updater = Updater(NAMES, groups(), config)
        assert config.protects == protects
        assert all((group.protection is not None) == protects for group in updater.groups)
