"""The natural gradient over modules, its curvature, and means over an edit's sequences."""

import dataclasses

import pytest
import torch
from models import tiny_model, tiny_tokenizer
from test_updater import NAMES, SHAPES, dense, groups, make_signals, one_edit
from torch.testing import assert_close

from hiedit.backbone.curvature import output_curvature
from hiedit.backbone.model import Backbone
from hiedit.backbone.moments import KeyMoments
from hiedit.backbone.signals import Probe
from hiedit.catalogue import load_method
from hiedit.config import UpdaterConfig
from hiedit.data.tokens import encode
from hiedit.updaters.averaging import averaged, share_at
from hiedit.updaters.group import through
from hiedit.updaters.natural import joint_length
from hiedit.updaters.updater import Updater


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def spd(size, seed):
    x = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed)).double()
    return x.T @ x / len(x)


def natural(**setting):
    """Float64, protection and curvature fitted, one token an edit solved to the letter."""
    config = UpdaterConfig(step="natural", eta=0.3, lam=1e-9, damping=1e-9, eps=1e-9, **setting)
    updater = Updater(NAMES, groups(), config).double()
    updater.fit_protection(
        {n: (spd(i, 7 + i), torch.tensor(2.0 + o)) for n, (i, o) in SHAPES.items()}
    )
    updater.fit_curvature({n: spd(o, 50 + j) for j, (n, (_, o)) in enumerate(SHAPES.items())})
    return updater


def at_the_key(updater, signals, mask=None):
    """By module, the change of its output at the keys of the one edit there, [T, O]."""
    mask = torch.ones(1, len(NAMES)) if mask is None else mask
    shifts = updater(signals, mask)
    return {n: signals.keys[n] @ dense(shifts, n).T for n in NAMES}


def test_it_gains_the_most_for_what_it_costs():
    """Against the optimum of the quadratic program, found by a linear solve over all modules."""
    updater, signals = natural(), make_signals(edit=(0,))
    changes = at_the_key(updater, signals)
    gain, cost, best = 0.0, 0.0, 0.0
    for j, (name, (i, o)) in enumerate(SHAPES.items()):
        key, grad = signals.keys[name][0], signals.grads[name][0]
        free = key @ torch.linalg.solve(spd(i, 7 + i), key)
        fisher, change = spd(o, 50 + j), changes[name][0]
        gain -= float(grad @ change)
        cost += float(change @ fisher @ change / free)
        best += float(free * grad @ torch.linalg.solve(fisher, grad))
    assert gain > 0
    assert gain**2 / cost == pytest.approx(best, rel=1e-5)  # Cauchy and Schwarz: the most there is


def test_its_length_is_in_typical_outputs():
    updater, signals = natural(), make_signals(edit=(0,))
    for name in NAMES:  # however long the gradients are
        signals.grads[name].mul_(1e-3)
    changes = at_the_key(updater, signals)
    parts = [float(changes[n].norm()) / (2.0 + o) ** 0.5 for n, (_, o) in SHAPES.items()]
    assert sum(p**2 for p in parts) / len(parts) == pytest.approx(0.3**2, rel=1e-5)


def test_modules_that_are_left_out_take_no_part_in_the_length():
    updater, signals = natural(), make_signals(edit=(0,))
    mask = torch.tensor([[1.0, 0, 0, 1.0, 0]])
    changes = at_the_key(updater, signals, mask)
    parts = [float(changes[n].norm()) / (2.0 + SHAPES[n][1]) ** 0.5 for n in ("a", "d")]
    assert sum(p**2 for p in parts) / 2 == pytest.approx(0.3**2, rel=1e-5)
    assert not changes["b"].any()


def test_an_edit_is_as_long_whatever_is_edited_beside_it():
    """In a module with orthogonal keys the edits of a batch do not see each other at all."""
    updater = natural()
    signals = make_signals(edit=(0, 1))
    signals.grads["a"][1] *= 1e6
    ones = torch.ones(2, len(NAMES))
    together = updater(signals, ones)
    alone = updater(one_edit(signals, 0), ones[:1])
    for name in NAMES:
        key = signals.keys[name][:1]
        one, other = (key @ dense(shifts, name).T for shifts in (together, alone))
        assert_close(one, other, rtol=1e-4, atol=1e-9)


def test_freedom_moves_an_edit_to_where_its_key_stands_apart():
    signals = make_signals(edit=(0,))
    free = {
        n: float(k[0] @ torch.linalg.solve(spd(k.shape[1], 7 + k.shape[1]), k[0]))
        for n, k in signals.keys.items()
    }
    one, two = (at_the_key(natural(freedom=f), signals) for f in (1.0, 2.0))
    shares = {n: float(two[n].norm() / one[n].norm()) for n in NAMES}
    ordered = sorted(NAMES, key=free.get)
    assert [shares[n] for n in ordered] == sorted(shares.values())


def test_only_the_protected_solver_takes_it():
    with pytest.raises(ValueError, match="solver=protected"):
        UpdaterConfig(solver="outer", step="natural")


def test_joint_length_survives_tiny_and_absent_gradients():
    lengths = torch.tensor([[3e-30, 0.0], [4e-30, 0.0]])
    found = joint_length(lengths, torch.ones(2, 2, dtype=torch.bool))
    assert found[0] > 0 and torch.isfinite(found).all()
    assert_close(
        joint_length(torch.tensor([[3.0], [4.0]]), torch.ones(2, 1, dtype=torch.bool)),
        torch.tensor([12.5]).sqrt(),
    )


def test_the_mean_is_over_the_subjects_of_one_edit_alone():
    rows = torch.arange(12.0).view(1, 6, 2)
    edit = torch.tensor([0, 0, 0, 1, 1, 1])
    subject = torch.tensor([True, True, False, True, False, True])
    found = averaged(rows, edit, subject)
    assert_close(found[0, 0], rows[0, :2].mean(0))
    assert_close(found[0, 5], rows[0, [3, 5]].mean(0))
    assert torch.equal(found[0, [2, 4]], rows[0, [2, 4]])
    assert_close(averaged(rows, edit, subject, 0.5)[0, 0], torch.tensor([0.5, 1.5]))
    assert torch.equal(averaged(rows, edit, None), rows)


@pytest.mark.parametrize("share", ["average_keys", "average_gradients"])
def test_means_reach_the_shift(share):
    signals = dataclasses.replace(
        make_signals(edit=(0, 0, 0)), subject=torch.ones(3, dtype=torch.bool)
    )
    shifts = natural(**{share: 1.0})(signals, torch.ones(1, len(NAMES)))
    part = "A" if share == "average_keys" else "B"
    for name in NAMES:
        rows = getattr(shifts[name], part)
        rows = rows if part == "A" else signals.keys[name] @ dense(shifts, name).T
        assert_close(rows, rows[:1].expand_as(rows), rtol=1e-3, atol=1e-7)


def test_means_are_taken_of_subjects_alone_in_the_model():
    """Signals say which tokens these are; the answer's positions are told from them."""
    backbone = Backbone(tiny_model("llama"), tiny_tokenizer())
    pairs = [("a b c", "d e"), ("f g h", "d e")]
    tokens = encode(backbone.tokenizer, pairs, [0, 0], subjects=[(2, 3), None])
    found = Probe(backbone, tokens, 1, "subject").signals()
    assert found.subject.tolist() == [True] + [False] * (len(found.edit) - 1)
    assert len(found.edit) > 1
    assert Probe(backbone, tokens, 1, "answer").signals().subject is None


def test_the_curvature_is_what_a_change_costs():
    """Against the exact Hessian of the KL at one position, by many draws."""
    name = "model.layers.3.mlp.down_proj"
    backbone = Backbone(tiny_model("llama").double(), tiny_tokenizer(), [name])
    batch = encode(backbone.tokenizer, [("a b", "c")])
    size = 1 + int(batch.attention.sum())
    with torch.enable_grad(), backbone.capture() as (_, outputs):
        logits = backbone.model(input_ids=batch.ids).logits[0]
    p = logits.detach().softmax(-1)
    out, exact = outputs[name], 0.0
    # The last layer's output at a position moves the prediction there alone.
    for s in range(size - 2):
        by_token = (torch.autograd.grad(row, out, retain_graph=True)[0] for row in logits[s])
        jacobian = torch.stack([grad[0, s] for grad in by_token])
        exact = exact + jacobian.T @ (p[s].diag() - p[s, :, None] * p[s]) @ jacobian
    draws = [output_curvature(backbone, [batch], seed)[name] for seed in range(600)]
    found = torch.stack(draws).mean(0) * (size - 1)
    assert float((found - exact).norm() / exact.norm()) < 0.15


def test_the_curvature_counts_no_padding_and_is_the_same_for_a_seed():
    backbone = Backbone(tiny_model("llama"), tiny_tokenizer())
    batch = encode(backbone.tokenizer, [("a b", "c"), ("a b d e f g", "c")], padding_side="left")
    one, two = (output_curvature(backbone, [batch], seed=3) for _ in range(2))
    assert all(torch.equal(one[n], two[n]) for n in backbone.names)
    with pytest.raises(ValueError, match="no texts"):
        output_curvature(backbone, [])


@pytest.mark.parametrize("freedom", [1.0, 2.0])
def test_the_trust_region_bounds_what_a_pass_costs(freedom):
    signals = make_signals(edit=(0,))

    def cost(updater):
        total = 0.0
        for j, (name, change) in enumerate(at_the_key(updater, signals).items()):
            key, i = signals.keys[name][0], SHAPES[name][0]
            free = key @ torch.linalg.solve(spd(i, 7 + i), key)
            total += float(change[0] @ spd(SHAPES[name][1], 50 + j) @ change[0] / free) / 2
        return total

    whole = cost(natural(freedom=freedom))
    assert cost(natural(freedom=freedom, trust_region=whole / 9)) == pytest.approx(whole / 9)
    assert cost(natural(freedom=freedom, trust_region=2 * whole)) == pytest.approx(whole)


def test_the_trust_region_is_each_edits_own():
    """Each of two edits in a batch is made as much shorter as it would be alone."""
    signals = make_signals(edit=(0, 1))
    ones = torch.ones(2, len(NAMES))
    free, bound = natural()(signals, ones), natural(trust_region=1e-3)(signals, ones)
    alone = [natural(trust_region=1e-3)(one_edit(signals, e), ones[:1]) for e in (0, 1)]
    for name in NAMES:
        for edit in (0, 1):
            key = signals.keys[name][edit : edit + 1]
            assert_close(
                key @ dense(bound, name).T, key @ dense(alone[edit], name).T, rtol=1e-4, atol=1e-9
            )
            assert (key @ dense(bound, name).T).norm() < (key @ dense(free, name).T).norm()


def test_the_trust_region_grows_with_the_tokens_of_the_answer():
    signals = make_signals(edit=(0,))
    three = dataclasses.replace(signals, answer=torch.tensor([3.0]))
    changes = at_the_key(natural(trust_region=1e-3), three)
    wider = at_the_key(natural(trust_region=3e-3), signals)
    narrow = at_the_key(natural(trust_region=1e-3), signals)
    for name in NAMES:
        assert_close(changes[name], wider[name])
        assert changes[name].norm() > 1.5 * narrow[name].norm()


def test_signals_say_how_long_the_answers_are():
    backbone = Backbone(tiny_model("llama"), tiny_tokenizer())
    pairs = [("a b", "c"), ("a b d", "c"), ("a", "d e f"), ("a b", "c")]
    batch = encode(backbone.tokenizer, pairs, [0, 0, 1, 2], padding_side="left")
    tokens = [len(backbone.tokenizer(a, add_special_tokens=False)["input_ids"]) for _, a in pairs]
    assert tokens[2] > tokens[0]  # or this test would say nothing
    signals = Probe(backbone, batch, 3, "answer").signals()
    labelled = (batch.labels >= 0).sum(1).float()
    assert_close(signals.answer, torch.stack([labelled[:2].mean(), labelled[2], labelled[3]]))
    assert signals.answer[1] > signals.answer[0]
    assert_close(signals.first(1).answer, signals.answer[:1])


def test_later_passes_average_half_as_far():
    assert share_at(0.8, 100, None) == 0.8
    assert [share_at(0.8, used, 2) for used in (0, 1, 2, 9)] == [0.8, 0.8, 0.4, 0.4]
    signals = dataclasses.replace(make_signals(edit=(0, 0)), subject=torch.tensor([True, True]))
    ones = torch.ones(1, len(NAMES))
    updater = natural(average_keys=1.0, average_gradients=1.0, average_passes=1)
    half = natural(average_keys=0.5, average_gradients=0.5)
    for name in NAMES:
        assert_close(dense(updater(signals, ones, used=1), name), dense(half(signals, ones), name))
        first = dense(updater(signals, ones), name)
        assert not torch.allclose(first, dense(half(signals, ones), name))


def test_own_text_weighs_beside_the_sentences():
    config = UpdaterConfig(own_text=8, own_weight=3.0)
    updater = Updater(["a"], {(4, 3): ["a"]}, config)
    sentences, own = spd(4, 1).float(), spd(4, 2).float()
    updater.fit_protection({"a": KeyMoments(sentences, torch.tensor(1.0), own=own)})
    alike = Updater(["a"], {(4, 3): ["a"]}, UpdaterConfig())
    alike.fit_protection({"a": KeyMoments(sentences + 3 * own, torch.tensor(1.0))})
    assert_close(updater.groups[0].protection.precision, alike.groups[0].protection.precision)


def test_the_default_method_can_do_without_own_text():
    """As users and the other tests switch it off; its weight then weighs nothing."""
    shipped = load_method("closed-form").updater
    assert shipped.own_weight > 0
    without = dataclasses.replace(shipped, own_text=0)
    moments = {"a": KeyMoments(spd(4, 1).float(), torch.tensor(1.0))}
    found = [
        Updater(["a"], {(4, 3): ["a"]}, config)
        for config in (without, dataclasses.replace(without, own_weight=0.0))
    ]
    for updater in found:
        updater.fit_protection(moments)
    one, other = (updater.groups[0].protection.precision for updater in found)
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"trust_region": 1e-3}, "step=natural"),
        ({"trust_region": 0.0, "step": "natural"}, "trust_region=0.0"),
        ({"own_weight": -2.0}, "own_weight=-2.0"),
        ({"average_passes": -1}, "average_passes=-1"),
    ],
)
def test_what_makes_no_sense_is_named(setting, said):
    with pytest.raises(ValueError, match=said):
        UpdaterConfig(**setting)


def test_keys_that_are_all_the_same_go_through_the_protection_as_one():
    precision, one = torch.randn(3, 8, 8), torch.randn(3, 1, 8)
    same, mixed = one.repeat(1, 4, 1), torch.randn(3, 4, 8)
    for keys in (same, mixed, one):
        assert_close(through(precision, keys), keys @ precision)
