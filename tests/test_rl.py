"""The environment, and one edit as an option of several passes."""

import copy

import pytest
import torch
from models import tiny_model, tiny_tokenizer
from torch.testing import assert_close

from hiedit.backbone.model import Backbone
from hiedit.config import MethodConfig, PassesConfig, SelectorConfig, UpdaterConfig
from hiedit.data.tokens import encode
from hiedit.methods import build_method
from hiedit.rl.environment import Environment, merge
from hiedit.rl.rollout import Rollout
from hiedit.types import IGNORE, EditBatch, EditRequest, Locality, Shift

MODULES = {
    "llama": ["model.layers.{0-1}.mlp.gate_proj", "model.layers.{0-1}.mlp.down_proj"],
    "gpt2": ["transformer.h.{0-1}.mlp.c_fc", "transformer.h.1.attn.c_attn"],
}
architectures = pytest.mark.parametrize("architecture", MODULES)
PRESERVE = [("Rome lies in", "Italy"), ("Lima is in", "Peru"), ("Ink is", "blue")]
OSLO = EditRequest(
    "Oslo lies in",
    "Peru",
    paraphrases=("Oslo is in", "Find Oslo in"),
    locality=(Locality("Bonn lies in", "Chad"), Locality("Oslo speaks", "Thai"), Locality("no")),
)
BONN = EditRequest("Bonn lies in", "Mali", paraphrases=("Bonn is in",))


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Models this small only wait for a second thread."""
    threads(1)


@pytest.fixture(scope="module")
def models():
    made = {name: tiny_model(name, num_hidden_layers=2) for name in MODULES}
    with torch.no_grad():
        made["llama"].lm_head.weight.mul_(4)  # so that it can be sure of something
    return made


@pytest.fixture
def make_backbone(models):
    """A fresh copy of a tiny model, ready to edit."""

    def make(architecture="llama"):
        model = copy.deepcopy(models[architecture])
        return Backbone(model, tiny_tokenizer(), MODULES[architecture])

    return make


def make_rollout(backbone, max=5, target=0.5, undo=True, selector=None, **updater):
    config = MethodConfig(
        "test",
        selector or SelectorConfig("all"),
        UpdaterConfig(**updater),
        passes=PassesConfig(max, target, undo),
    )
    return build_method(backbone, config, preserve=PRESERVE).rollout


def random_shifts(backbone, seed=0, rank=3, scale=None):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return 0.05 * torch.randn(*shape, generator=draw)

    return {
        name: Shift(normal(rank, m.in_features), normal(m.out_features, rank), scale)
        for name, m in backbone.modules.items()
    }


def weights(backbone):
    return {name: m.weight.clone() for name, m in backbone.modules.items()}


def same_bits(one, other):
    return all(torch.equal(one[n].view(torch.int32), other[n].view(torch.int32)) for n in one)


def tokens(backbone, *pairs):
    return encode(backbone.tokenizer, pairs or PRESERVE, padding_side="left")


def plain_nll(model, tokenizer, prompt, target):
    """(loss, smallest probability) of the answer by plain transformers, unpadded."""
    batch = encode(tokenizer, [(prompt, target)])
    with torch.no_grad():
        logp = model(input_ids=batch.ids).logits[0, :-1].log_softmax(-1)
    labels = batch.labels[0, 1:]
    chosen = logp[labels != IGNORE].gather(1, labels[labels != IGNORE][:, None])
    return float(-chosen.mean()), float(chosen.min().exp())


def plain(backbone, request):
    return plain_nll(backbone.model, backbone.tokenizer, request.prompt, request.target)


# Environment


@architectures
def test_pending_committed_and_dense_agree(make_backbone, architecture):
    backbone = make_backbone(architecture)
    env, batch, before = Environment(backbone), tokens(backbone), weights(backbone)
    passes = [random_shifts(backbone, seed, scale=torch.tensor([1.0, 0.0, 0.5])) for seed in (1, 2)]
    for shifts in passes:
        env.push(shifts)
    functional = env.answers(batch).logits
    assert same_bits(before, weights(backbone)), "a pass on trial touches no weight"
    env.commit()
    assert env.pending == []
    committed = backbone.answers(batch).logits
    assert_close(committed, functional, rtol=1e-5, atol=1e-5)
    for name, module in backbone.modules.items():
        dense = sum(shifts[name].dense() for shifts in passes)
        wanted = before[name] + (dense.T if module.conv1d else dense)
        assert_close(module.weight, wanted, rtol=1e-5, atol=1e-6)


def test_candidate_comes_on_top_of_the_pending_passes(make_backbone):
    backbone = make_backbone()
    env, batch = Environment(backbone), tokens(backbone)
    one, two = random_shifts(backbone, 1), random_shifts(backbone, 2)
    env.push(one)
    together = env.answers(batch, two).logits
    env.push(two)
    assert_close(env.answers(batch).logits, together)
    assert set(env.pop()) == set(two)
    env.commit()
    with backbone.shifted(two):
        assert_close(backbone.answers(batch).logits, together, rtol=1e-5, atol=1e-5)


def test_pop_takes_the_last_pass_back(make_backbone):
    backbone = make_backbone()
    env, batch = Environment(backbone), tokens(backbone)
    before = env.answers(batch).logits
    env.push(random_shifts(backbone))
    assert not torch.equal(env.answers(batch).logits, before)
    env.pop()
    assert torch.equal(env.answers(batch).logits, before)


def test_pushed_pass_keeps_no_graph_and_no_untouched_module(make_backbone):
    backbone = make_backbone()
    env = Environment(backbone)
    shifts = random_shifts(backbone, scale=torch.ones(3, requires_grad=True))
    off = backbone.names[0]
    shifts[off] = Shift(shifts[off].A, shifts[off].B, torch.zeros(3))
    env.push(shifts)
    assert list(env.pending[0]) == backbone.names[1:]
    assert not any(shift.scale.requires_grad for shift in env.pending[0].values())


def test_merge_keeps_the_order_of_rows_and_drops_masked_ones():
    draw = torch.Generator().manual_seed(0)

    def shift(scale):
        r = 3 if scale is None else len(scale)
        a, b = torch.randn(r, 4, generator=draw), torch.randn(5, r, generator=draw)
        return Shift(a, b, None if scale is None else torch.tensor(scale))

    first = {"x": shift([1.0, 0.0]), "z": shift([0.0])}
    second = {"y": shift(None), "x": shift([0.0, 0.5, 1.0])}
    merged = merge([first, second])
    assert set(merged) == {"x", "y"}
    assert merged["x"].rank == 3 and torch.equal(merged["x"].scale, torch.tensor([1.0, 0.5, 1.0]))
    assert torch.equal(merged["x"].A, torch.cat([first["x"].A[:1], second["x"].A[1:]]))
    assert_close(merged["x"].dense(), first["x"].dense() + second["x"].dense())
    assert_close(merged["y"].dense(), second["y"].dense())
    assert merge([]) == {} and merge([{}]) == {}


@architectures
def test_reset_restores_the_bits(make_backbone, architecture):
    backbone = make_backbone(architecture)
    with torch.no_grad():
        for module in backbone.modules.values():
            module.weight[0, :5] = -0.0
    env, before = Environment(backbone), weights(backbone)
    for seed in range(3):
        env.push(random_shifts(backbone, seed))
        env.commit()
    env.push(random_shifts(backbone, 9))
    assert not same_bits(weights(backbone), before)
    env.reset()
    assert same_bits(weights(backbone), before) and env.pending == []
    assert env.state.edits == 0


def test_shift_that_is_not_finite_is_refused_before_any_weight_changes(make_backbone):
    backbone = make_backbone()
    env, before = Environment(backbone), weights(backbone)
    shifts = random_shifts(backbone)
    shifts[backbone.names[-1]].B[0, 0] = torch.nan
    env.push(shifts)
    with pytest.raises(ValueError, match=f"{backbone.names[-1]} is not finite"):
        env.commit()
    assert same_bits(weights(backbone), before)


# Rollout


def test_rollout_stops_when_the_edit_holds(make_backbone):
    backbone = make_backbone()
    rollout = make_rollout(backbone, max=12)
    assert plain(backbone, OSLO)[1] < 0.1
    outcome = rollout.step(EditBatch((OSLO.unaided(),)))
    loss, confidence = plain(backbone, OSLO)
    assert outcome.held and confidence > 0.5 and 1 <= outcome.passes < 12
    assert_close(float(outcome.loss), loss, rtol=1e-3, atol=1e-4)
    assert_close(float(outcome.confidence), confidence, rtol=1e-3, atol=1e-4)
    assert torch.equal(outcome.mask, torch.ones(1, 4)) and list(outcome.shifts) == backbone.names


def test_rollout_leaves_an_edit_that_holds_alone(make_backbone):
    backbone = make_backbone()
    before = weights(backbone)
    outcome = make_rollout(backbone, target=1e-9).step(EditBatch((OSLO.unaided(),)))
    assert outcome.held and outcome.passes == 0 and outcome.shifts == {}
    assert torch.equal(outcome.mask, torch.zeros(1, 4)) and same_bits(weights(backbone), before)


def test_rollout_edits_only_those_of_a_step_that_do_not_hold(make_backbone):
    """Its shift is what it would be without the edit that holds."""
    backbone = make_backbone()
    sure = [plain(backbone, r)[1] for r in (OSLO, BONN)]
    assert sure[0] != sure[1]
    target, weak = (sum(sure) / 2, int(sure[1] < sure[0]))
    rollout = make_rollout(backbone, max=1, target=target, undo=False)
    together = rollout.step(EditBatch((OSLO.unaided(), BONN.unaided())))
    assert torch.equal(together.mask.sum(1).bool(), torch.tensor([weak == 0, weak == 1]))
    rollout.reset()
    alone = rollout.step(EditBatch(((OSLO, BONN)[weak].unaided(),)))
    for name in backbone.names:
        wanted = alone.shifts[name].dense()
        assert_close(together.shifts[name].dense(), wanted, rtol=1e-3, atol=1e-5)


def test_rollout_respects_the_largest_number_of_passes(make_backbone):
    backbone = make_backbone()
    rollout = make_rollout(backbone, max=3, eta=1e-4)
    outcome = rollout.step(EditBatch((OSLO.unaided(),)))
    assert outcome.passes == 3 and not outcome.held
    tokens_of_a_pass = len("<" + "Oslo lies in Per")
    assert all(shift.rank == 3 * tokens_of_a_pass for shift in outcome.shifts.values())


def uphill(rollout, after=0):
    """A pass hook that goes the wrong way, far enough to matter, from pass ``after`` on."""
    seen = []

    def on_pass(signals, action):
        size = -8.0 if len(seen) >= after else 1.0
        seen.append(action.mask)
        shifts = rollout.updater(signals, action.mask)
        return {n: Shift(s.A, size * s.B, s.scale) for n, s in shifts.items()}

    on_pass.masks = seen
    return on_pass


@pytest.mark.parametrize("max", [1, 3, 9])
@pytest.mark.parametrize("way", ["uphill", "too-far"])
def test_pass_that_raises_the_loss_is_undone(make_backbone, max, way):
    backbone = make_backbone()
    before, base = weights(backbone), plain(backbone, OSLO)
    rollout = make_rollout(backbone, max=max, eta=1.0 if way == "uphill" else 1e4)
    precision = [g.protection.precision.clone() for g in rollout.updater.groups]
    hook = uphill(rollout) if way == "uphill" else None
    outcome = rollout.step(EditBatch((OSLO.unaided(),)), hook)
    assert same_bits(weights(backbone), before) and outcome.shifts == {}
    assert torch.equal(outcome.mask, torch.zeros(1, 4)) and not outcome.held
    assert outcome.passes <= max
    assert_close((float(outcome.loss), float(outcome.confidence)), base, rtol=1e-3, atol=1e-5)
    for group, old in zip(rollout.updater.groups, precision, strict=True):
        assert torch.equal(group.protection.precision, old), "nothing was learned of it"


def test_pass_that_raises_the_loss_stays_where_undo_is_off(make_backbone):
    backbone = make_backbone()
    base, _ = plain(backbone, OSLO)
    rollout = make_rollout(backbone, max=1, undo=False)
    outcome = rollout.step(EditBatch((OSLO.unaided(),)), uphill(rollout))
    assert outcome.passes == 1 and plain(backbone, OSLO)[0] > base and outcome.mask.sum() == 4


def test_undone_pass_leaves_the_earlier_ones_and_their_mask(make_backbone):
    backbone = make_backbone()
    selector = SelectorConfig("random", k=1, every_pass=True)
    rollout = make_rollout(backbone, max=9, selector=selector, eta=0.2)
    hook = uphill(rollout, after=1)
    outcome = rollout.step(EditBatch((OSLO.unaided(),)), hook)
    assert len(hook.masks) == 2 and not torch.equal(*hook.masks)
    assert torch.equal(outcome.mask, hook.masks[0]) and len(outcome.shifts) == 1
    assert_close(float(outcome.loss), plain(backbone, OSLO)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("every_pass", (False, True), ids=("per-edit", "per-pass"))
def test_mask_is_chosen_once_per_edit_unless_every_pass_chooses(make_backbone, every_pass):
    selector = SelectorConfig("random", k=1, every_pass=every_pass)
    rollout = make_rollout(make_backbone(), max=6, selector=selector, eta=0.02)
    outcomes = [rollout.step(EditBatch((OSLO.unaided(),))) for _ in range(3)]
    assert all(o.passes > 1 for o in outcomes)
    assert all(o.mask.sum() == 1 for o in outcomes) != every_pass


def test_pass_that_overshoots_is_retried_at_a_fraction(make_backbone):
    backbone = make_backbone()
    base = plain(backbone, OSLO)[0]
    kept = set()
    for eta in (2.0, 4.0, 8.0, 16.0):
        rollout = make_rollout(backbone, max=9, eta=eta)
        outcome = rollout.step(EditBatch((OSLO.unaided(),)))
        if outcome.shifts:
            assert plain(backbone, OSLO)[0] < base
            kept |= set(outcome.shifts[backbone.names[0]].scale.tolist())
        rollout.reset()
    assert kept & {0.5, 0.25, 0.125} and kept <= {1.0, 0.5, 0.25, 0.125}


def test_nothing_to_shift_is_no_pass(make_backbone):
    backbone = make_backbone()
    before = weights(backbone)
    outcome = make_rollout(backbone, kind="none").step(EditBatch((OSLO.unaided(),)))
    assert outcome.passes == 0 and outcome.mask.sum() == 0 and not outcome.held
    assert same_bits(weights(backbone), before)


def test_module_that_got_no_shift_does_not_count_as_touched(make_backbone):
    backbone = make_backbone()
    rollout = make_rollout(backbone, max=1, eta=0.2)

    def on_pass(signals, action):
        shifts = dict(rollout.updater(signals, action.mask))
        del shifts[backbone.names[1]]  # as one that was not finite
        return shifts

    outcome = rollout.step(EditBatch((OSLO.unaided(),)), on_pass)
    assert torch.equal(outcome.mask, torch.tensor([[1.0, 0.0, 1.0, 1.0]]))


@pytest.mark.parametrize("observe", [True, False])
def test_statistics_move_only_where_the_rollout_observes(make_backbone, observe):
    rollout = make_rollout(make_backbone(), max=1, normalise="running", solver="outer", eta=1e-3)
    rollout = Rollout(rollout.env, rollout.selector, rollout.updater, rollout.passes, observe)
    rollout.step(EditBatch((OSLO.unaided(),)))
    assert all(bool(g.key_norm.count > 0) == observe for g in rollout.updater.groups)


def test_edits_are_protected_until_reset(make_backbone):
    backbone = make_backbone()
    static = SelectorConfig("static", modules=backbone.names[:1])
    rollout = make_rollout(backbone, selector=static)
    before = {id(g): g.protection.precision.clone() for g in rollout.updater.groups}
    rollout.step(EditBatch((OSLO.unaided(),)))
    for group in rollout.updater.groups:
        for m, name in enumerate(group.names):
            same = torch.equal(group.protection.precision[m], before[id(group)][m])
            assert same != (name == backbone.names[0])
    rollout.reset()
    assert all(torch.equal(g.protection.precision, before[id(g)]) for g in rollout.updater.groups)
