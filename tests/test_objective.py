"""The reward: which sequences it looks at, its terms and its gradient, against dense weights."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from models import tiny_model, tiny_tokenizer
from torch.testing import assert_close

from hiedit.backbone.model import Backbone
from hiedit.backbone.signals import Probe
from hiedit.config import ObjectiveConfig, UpdaterConfig
from hiedit.data.tokens import encode
from hiedit.rl.environment import Environment
from hiedit.rl.objective import Objective, squared_norm
from hiedit.types import IGNORE, EditBatch, EditRequest, Locality, Shift, Signals
from hiedit.updaters.updater import Updater

PRESERVE = [("Rome lies in", "Italy"), ("Lima is in", "Peru"), ("Ink is", "blue")]
REQUESTS = tuple(
    EditRequest(
        f"{city} lies in",
        land,
        paraphrases=(f"{city} is in", f"Find {city} in"),
        locality=(Locality(f"{city} eats", "rice"), Locality(f"{city} has", "sun"), Locality("?")),
    )
    for city, land in (("Oslo", "Peru"), ("Bonn", "Mali"), ("Kyiv", "Chad"), ("Suva", "Oman"))
)


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Models this small only wait for a second thread."""
    threads(1)


@pytest.fixture(scope="module")
def base_models():
    llama = tiny_model("llama", num_hidden_layers=2)
    with torch.no_grad():
        llama.lm_head.weight.mul_(4)  # so that it can be sure of something
    return {"llama": llama, "phi": tiny_model("phi", num_hidden_layers=2)}


@pytest.fixture
def backbone(base_models):
    modules = ["model.layers.{0-1}.mlp.gate_proj", "model.layers.{0-1}.mlp.down_proj"]
    return Backbone(copy.deepcopy(base_models["llama"]), tiny_tokenizer(), modules)


def weights(backbone):
    return {name: m.weight.clone() for name, m in backbone.modules.items()}


def same_bits(one, other):
    return all(torch.equal(one[n].view(torch.int32), other[n].view(torch.int32)) for n in one)


# The reward


def rows_of(batch, tokenizer):
    """(text, weight) of every sequence."""
    texts = [
        "".join(tokenizer.convert_ids_to_tokens(ids[keep.bool()])).removeprefix("<s>")
        for ids, keep in zip(batch.tokens.ids, batch.tokens.attention, strict=True)
    ]
    return list(zip(texts, batch.weights.tolist(), strict=True))


def walk(objective, steps):
    """The reward batch of the last of ``steps``."""
    for step in steps[:-1]:
        objective.remember(step)
    return objective.batch(steps[-1], "cpu")


STEPS = [EditBatch((request,), i) for i, request in enumerate(REQUESTS)]


@pytest.mark.parametrize("kind", ["edit", "trajectory"])
def test_reward_looks_at_the_current_and_the_last_edits(kind):
    """One row of the edit and one per paraphrase; ``gamma^age`` shared by the rows of an edit."""
    config = ObjectiveConfig(kind, back_depth=2, gamma=0.5, paraphrases=1, locality=5)
    batch = walk(Objective(config, tiny_tokenizer()), STEPS)
    rows = rows_of(batch, tiny_tokenizer())
    edit, local = rows[: batch.edits], rows[batch.edits :]
    assert edit[0] == ("Suva lies in Oman", 0.5)
    assert edit[1][0] in ("Suva is in Oman", "Find Suva in Oman") and edit[1][1] == 0.5
    assert local[:2] == [("Suva eats rice", 0.5), ("Suva has sun", 0.5)] or local[:2] == [
        ("Suva has sun", 0.5),
        ("Suva eats rice", 0.5),
    ]
    if kind == "edit":
        assert len(edit) == 2 and len(local) == 2
        return
    assert len(edit) == 4 and len(local) == 4
    for age, city in ((1, "Kyiv"), (2, "Bonn")):
        text, weight = edit[1 + age]
        assert city in text and "lies" not in text and weight == 0.5**age
        text, weight = local[1 + age]
        assert city in text and weight == 0.5**age


@pytest.mark.parametrize(("back_depth", "reached"), [(0, 0), (1, 1), (10, 3)])
def test_back_depth_is_how_many_earlier_edits_are_looked_at(back_depth, reached):
    config = ObjectiveConfig("trajectory", back_depth=back_depth, paraphrases=0, locality=0)
    objective = Objective(config, tiny_tokenizer())
    assert walk(objective, STEPS).edits == 1 + reached
    objective.reset()
    assert objective.batch(STEPS[0], "cpu").edits == 1


def test_edit_without_paraphrases_or_gold_answers_stands_for_itself():
    bare = EditRequest("Oslo lies in", "Peru", locality=(Locality("no answer"),))
    objective = Objective(ObjectiveConfig("trajectory", gamma=0.5), tiny_tokenizer())
    batch = walk(objective, [EditBatch((bare,)), EditBatch((bare, bare))])
    wanted = [("Oslo lies in Peru", w) for w in (1.0, 1.0, 0.5)]
    assert rows_of(batch, tiny_tokenizer()) == wanted and batch.edits == 3


def test_the_edits_own_prompt_can_be_left_out_as_the_publications_do():
    config = ObjectiveConfig("trajectory", back_depth=1, paraphrases=2, locality=0, prompt=False)
    batch = walk(Objective(config, tiny_tokenizer()), STEPS)
    texts = [text for text, _ in rows_of(batch, tiny_tokenizer())]
    assert sorted(texts[:2]) == ["Find Suva in Oman", "Suva is in Oman"]
    assert "lies" not in " ".join(texts)
    bare = EditBatch((EditRequest("Oslo lies in", "Peru"),))  # nothing else to look at
    assert Objective(config, tiny_tokenizer()).batch(bare, "cpu").edits == 1


def test_choice_of_prompts_is_seeded():
    config = ObjectiveConfig("trajectory", paraphrases=1, locality=1)

    def texts(seed):
        objective = Objective(config, tiny_tokenizer(), seed)
        batches = [walk(objective, STEPS) for _ in range(4)]
        return [rows_of(batch, tiny_tokenizer()) for batch in batches]

    assert texts(1) == texts(1) != texts(2)


@pytest.mark.parametrize("reference", ["before", "base"])
def test_reference_is_the_model_before_the_step_or_the_base_model(backbone, reference):
    env = Environment(backbone)
    objective = Objective(ObjectiveConfig("edit", reference=reference), backbone.tokenizer)
    batch = objective.batch(STEPS[0], "cpu")
    local = batch.tokens.select(torch.arange(batch.edits, len(batch.tokens)))
    base = backbone.answers(local).logits.log_softmax(-1)
    env.push({backbone.names[0]: Shift(torch.ones(1, 32), 0.1 * torch.ones(80, 1))})
    env.commit()
    edited = weights(backbone)
    before = backbone.answers(local).logits.log_softmax(-1)
    assert not torch.allclose(before, base, atol=1e-3)
    found = objective.reference(env, batch)
    assert_close(found, before if reference == "before" else base)
    assert not found.requires_grad and same_bits(edited, weights(backbone))


def test_no_reference_where_locality_does_not_count(backbone):
    env = Environment(backbone)
    off = Objective(ObjectiveConfig("edit", c_loc=0.0), backbone.tokenizer)
    assert off.reference(env, off.batch(STEPS[0], "cpu")) is None
    bare = Objective(ObjectiveConfig("edit", locality=0), backbone.tokenizer)
    assert bare.reference(env, bare.batch(STEPS[0], "cpu")) is None


def test_squared_norm_needs_no_dense_shift():
    draw = torch.Generator().manual_seed(0)
    shifts = {
        "a": Shift(torch.randn(3, 6, generator=draw), torch.randn(5, 3, generator=draw)),
        "b": Shift(torch.randn(2, 4, generator=draw), torch.randn(7, 2, generator=draw),
                   torch.tensor([0.5, 0.0])),
    }  # fmt: skip
    wanted = sum(shift.dense().square().sum() for shift in shifts.values())
    assert_close(squared_norm(shifts), wanted)


class Case:
    """A step of the objective on a float64 model of four modules, and the same reward from dense
    weights by plain transformers, term by term."""

    def __init__(self, model, **objective):
        modules = ["model.layers.{0-1}.mlp.fc1", "model.layers.{0-1}.mlp.fc2"]
        self.backbone = Backbone(copy.deepcopy(model).double(), tiny_tokenizer(), modules)
        self.env, names = Environment(self.backbone), self.backbone.names
        config = ObjectiveConfig("trajectory", gamma=0.5, c_loc=0.7, **objective)
        self.objective = Objective(config, self.backbone.tokenizer)
        self.batch = walk(self.objective, STEPS[:2])
        self.reference = self.objective.reference(self.env, self.batch)
        torch.manual_seed(0)
        updater = UpdaterConfig("hypernetwork", "protected", eta=0.2, rank=4, per_module=True)
        self.updater = Updater(names, self.backbone.shape_groups(), updater).double()
        with torch.no_grad():
            for parameter in self.updater.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        moments = {
            n: ((x := torch.randn(50, m.in_features).double()).T @ x / 50, torch.tensor(3.0))
            for n, m in self.backbone.modules.items()
        }
        self.updater.fit_protection(moments)
        self.moments = {n: (c, float(p)) for n, (c, p) in moments.items()}
        edit = encode(self.backbone.tokenizer, [(REQUESTS[1].prompt, "Mali")])
        signals = Probe(self.backbone, edit, 1).signals()
        to_double = {
            field: {n: x.double() for n, x in getattr(signals, field).items()}
            for field in ("keys", "grads")
        }
        self.signals: Signals = dataclasses.replace(signals, **to_double)
        self.updater.observe(self.signals)

    def reward(self, mask, gate=None):
        shifts = self.updater(self.signals, mask, every=True)
        in_gate = gate is None or gate.requires_grad
        energy = self.updater.energy(shifts, in_gate)
        return self.objective(self.env, self.batch, self.reference, shifts, energy, in_gate)

    @torch.no_grad()
    def dense(self, mask):
        """(edit, locality, energy, norm)"""
        shifts = self.updater(self.signals, torch.ones_like(mask))
        model, power, norm = copy.deepcopy(self.backbone.model), 0.0, 0.0
        for column, (name, shift) in enumerate(shifts.items()):
            change = mask[0, column] * (shift.B @ shift.A)
            model.get_submodule(name).weight += change
            moment, output = self.moments[name]
            power += (change @ moment @ change.T).trace() / output
            norm += change.square().sum()
        edit = locality = 0.0
        for row, weight in enumerate(self.batch.weights.double()):
            tokens = self.batch.tokens
            keep = tokens.attention[row].bool()
            ids, labels = tokens.ids[row, keep][None], tokens.labels[row, keep][1:]
            new, old = (
                m(input_ids=ids).logits[0, :-1][labels != IGNORE].log_softmax(-1)
                for m in (model, self.backbone.model)
            )
            if row < self.batch.edits:
                edit += weight * F.nll_loss(new, labels[labels != IGNORE])
            else:
                kl = F.kl_div(new, old, log_target=True, reduction="none").sum(-1)
                locality += weight * kl.mean()
        return torch.stack([edit, locality, power, norm])

    def dense_loss(self, mask):
        c = self.objective.config
        return self.dense(mask) @ torch.tensor([1.0, c.c_loc, c.rho, c.c_reg], dtype=mask.dtype)


HALF = [[1.0, 0.0, 0.5, 1.0]]


@pytest.mark.parametrize("penalty", ["rho", "c_reg", "none"])
def test_terms_of_the_reward_equal_dense_ones(base_models, penalty):
    case = Case(base_models["phi"], **({} if penalty == "none" else {penalty: 0.3}))
    mask = torch.tensor(HALF, dtype=torch.float64)
    reward, (edit, locality, power, norm) = case.reward(mask), case.dense(mask)
    assert_close(reward.edit.double(), edit, rtol=1e-4, atol=1e-5)
    assert_close(reward.locality.double(), locality, rtol=1e-4, atol=1e-5)
    size = {"rho": power, "c_reg": norm, "none": torch.zeros(())}[penalty]
    assert size > 1e-3 or penalty == "none"
    assert_close(reward.size.double(), size.double(), rtol=1e-4, atol=1e-5)
    assert_close(reward.loss.double(), edit + 0.7 * locality + 0.3 * size, rtol=1e-4, atol=1e-5)


def test_reward_of_no_shift_at_all_is_that_of_the_model(base_models):
    case = Case(base_models["phi"], rho=1.0, c_reg=1.0)
    mask = torch.zeros(1, 4)
    zero = torch.zeros(4)
    reward = case.objective(case.env, case.batch, case.reference, {}, zero, mask)
    assert reward.locality.abs() < 1e-6 and reward.size == 0
    assert_close(reward.loss.double(), case.dense_loss(mask.double()), rtol=1e-4, atol=1e-5)


def test_gradient_of_the_reward_equals_finite_differences(base_models):
    """The whole chain: hypernetwork, solver, step sizes, mask, model, all terms of the reward."""
    case = Case(base_models["phi"], rho=0.2, c_reg=0.1)
    mask = torch.tensor(HALF, dtype=torch.float64, requires_grad=True)
    case.reward(mask).loss.backward()
    first, second = case.updater.groups
    checked = [
        *((mask, (0, column)) for column in range(4)),
        (first.log_eta, (0,)),
        (second.log_lam, (1,)),
        (first.net.blocks[0].down, (0, 3, 1)),
        (first.net.blocks[0].up, (0, 1, 40)),
        (second.net.blocks[1].scale, (1, 0, 7)),
        (second.net.blocks[0].shift, (1, 0, 90)),
    ]
    step = 1e-4
    for parameter, index in checked:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[index] += sign * step
                values.append(case.dense_loss(mask.detach()))
                parameter[index] -= sign * step
        slope = (values[0] - values[1]) / (2 * step)
        assert_close(parameter.grad[index], slope, rtol=1e-3, atol=1e-6)


def test_size_penalties_reach_the_gate_only_where_they_may(base_models):
    slopes = {}
    for name, penalties, through in (
        ("both", {"rho": 5.0, "c_reg": 5.0}, True),
        ("kept-out", {"rho": 5.0, "c_reg": 5.0}, False),
        ("none", {}, True),
    ):
        case = Case(base_models["phi"], **penalties)
        mask = torch.tensor(HALF, dtype=torch.float64, requires_grad=True)
        case.reward(mask, mask if through else mask.detach()).loss.backward()
        slopes[name] = mask.grad
        assert case.updater.groups[0].log_eta.grad.abs().sum() > 0
    assert_close(slopes["kept-out"], slopes["none"])
    assert not torch.allclose(slopes["both"], slopes["none"], rtol=0.1)


@pytest.mark.parametrize("at_once", [1, 2, 3, 5])
def test_a_reward_in_parts_is_the_reward(base_models, at_once):
    """The same terms, gradients and references, some sequences at a time."""
    found = []
    for size in (0, at_once):
        case = Case(base_models["phi"], rho=0.2, c_reg=0.1, at_once=size)
        assert len(case.batch.tokens) > 5
        mask = torch.tensor(HALF, dtype=torch.float64, requires_grad=True)
        reward = case.reward(mask)
        reward.loss.backward()
        grads = [mask.grad, *(p.grad for p in case.updater.parameters() if p.grad is not None)]
        (measured,) = case.objective.references._measured
        seen = measured.answers
        found.append([reward.loss, reward.edit, reward.locality, reward.size, seen.logits, *grads])
        assert measured.pairs == case.batch.local and seen.rows == len(case.batch.local)
        assert seen.row.tolist() == sorted(seen.row.tolist())
        assert found[0][2] > 0 and mask.grad.abs().min() > 0
    for whole, parts in zip(*found, strict=True):
        assert_close(parts, whole, rtol=1e-6, atol=1e-9)


def test_parts_need_no_gradient(base_models):
    whole, parts = (Case(base_models["phi"], at_once=size) for size in (0, 2))
    with torch.no_grad():
        assert_close(*(case.reward(torch.ones(1, 4).double()).loss for case in (whole, parts)))
