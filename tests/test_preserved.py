"""Preserved prompts that an edit has to leave answered: drawn, asked, kept with the editor."""

import copy
import dataclasses

import pytest
import torch
from models import tiny_model, tiny_tokenizer

from hiedit import Editor
from hiedit.backbone.losses import answer_confidence
from hiedit.backbone.model import Backbone
from hiedit.config import MethodConfig, PassesConfig, SelectorConfig, UpdaterConfig
from hiedit.data.tokens import encode
from hiedit.guard import Guard
from hiedit.methods import (
    build_method,
    editor_of,
    editor_tensors,
    load_editor,
    save_editor,
    write_editor,
)
from hiedit.rl.preserved import Preserved, known_pairs
from hiedit.types import EditBatch, EditRequest

MODULES = ["model.layers.{0-1}.mlp.gate_proj", "model.layers.{0-1}.mlp.down_proj"]
PAIRS = [
    ("Rome lies in", "Italy"),
    ("Lima is in", "Peru"),
    ("Ink is", "blue"),
    ("Snow is", "white"),
]
OSLO, BONN = EditRequest("Oslo lies in", "Peru"), EditRequest("Bonn lies in", "Mali")
CAIRO = EditRequest("Find Cairo in", "Chad")  # shares no telling word with the pairs
MANY = [(f"Town {i} has the {'tower' if i % 2 else 'port'} of", f"Name {i}") for i in range(400)]


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.fixture(scope="module")
def knowing():
    """A tiny model that knows ``PAIRS``, so that something can be preserved."""
    model = tiny_model("llama", num_hidden_layers=2)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    made = build_method(Backbone(model, tiny_tokenizer(), MODULES), config(0), preserve=PAIRS)
    for _ in range(3):  # what was taught first fades
        for pair in PAIRS:
            made.rollout.step(EditBatch((EditRequest(*pair),)))
    assert (confidence(made.rollout.env.backbone, PAIRS) > 0.8).all()
    return model


@pytest.fixture
def backbone(knowing):
    return Backbone(copy.deepcopy(knowing), tiny_tokenizer(), MODULES)


def config(each=2, selector=None, target=0.9, **passes):
    return MethodConfig(
        "test",
        selector or SelectorConfig("all"),
        UpdaterConfig(eta=0.1),
        passes=PassesConfig(20, target, preserved=each, **passes),
    )


def asking(pairs, each, **more):
    return Preserved(pairs, PassesConfig(preserved=each, **more))


def confidence(backbone, pairs):
    """[N]: the smallest probability in each answer."""
    with torch.no_grad():
        tokens = encode(backbone.tokenizer, pairs, padding_side="left")
        return answer_confidence(backbone.answers(tokens))


# What is drawn


def test_a_draw_does_not_depend_on_the_draws_before():
    one, other = asking(MANY, 5), asking(MANY, 5)
    other.draw(EditBatch((BONN,)))
    drawn = one.draw(EditBatch((OSLO,)))
    assert drawn == other.draw(EditBatch((OSLO,))) and drawn != one.draw(EditBatch((BONN,)))
    pairs, owner = one.draw(EditBatch((OSLO, BONN)))
    assert owner == [0] * 5 + [1] * 5 and pairs[:5] == drawn[0] and set(pairs) <= set(MANY)
    assert len(set(drawn[0])) == 5


def test_few_pairs_are_drawn_whole_and_none_without_pairs():
    assert sorted(asking(PAIRS, 9).draw(EditBatch((BONN,)))[0]) == sorted(PAIRS[1:])  # lies
    assert asking((), 9).draw(EditBatch((BONN,))) == ([], [])
    assert asking(PAIRS, 0).draw(EditBatch((BONN,))) == ([], [])


@pytest.mark.parametrize(
    "request_, about",
    [
        (EditRequest("The port of town 7 is", "Bari"), {7}),  # 7 is rare; port, town are not
        (EditRequest("The best harbour is", "Bari"), set()),  # no word says what it is about
        (EditRequest("Near town 12 and 13 is", "Bari", subject="TOWN 12"), {12}),
        (EditRequest("Town 12 is", "Bari", subject="Q17"), {12}),  # the prompt says otherwise
        (EditRequest("Town 999 is", "Bari", subject="Town 999"), set()),
    ],
)
def test_what_may_be_about_an_edit_is_asked_no_more(request_, about):
    preserved = asking(MANY, 400)
    assert preserved.about(request_) == about
    gone = {MANY[i] for i in about}
    assert set(MANY) - set(preserved.draw(EditBatch((request_,)))[0]) == gone
    assert set(preserved.draw(EditBatch((OSLO,)))[0]) == set(MANY), "a trial decides nothing"
    preserved.edited([request_])
    assert set(MANY) - set(preserved.draw(EditBatch((OSLO,)))[0]) == gone
    preserved.reset()
    assert set(preserved.draw(EditBatch((OSLO,)))[0]) == set(MANY)


def test_only_what_the_base_model_answers_is_preserved(backbone):
    wrong = [("Lima is in", "Chad"), ("Ink is", "warm")]
    assert known_pairs(backbone, [*wrong, *PAIRS], 0.5, batch=4) == tuple(PAIRS)
    assert known_pairs(backbone, PAIRS, 1.0) == ()


def test_the_least_sure_of_those_that_are_screened_are_asked():
    seen = []

    def sure(pairs):
        seen.append(list(pairs))
        return torch.tensor([float("nan") if p[1] == "Name 7" else float(p[1][5:]) for p in pairs])

    screened = asking(MANY, 3, screened=20)
    pairs, owner = screened.draw(EditBatch((OSLO, BONN)), sure)
    assert len(seen) == 1 and len(seen[0]) == 40, "one question for the whole batch"
    numbers = [[int(answer[5:]) for _, answer in some] for some in (seen[0][:20], seen[0][20:])]
    wanted = [f"Name {n}" for some in numbers for n in sorted(some, key=lambda n: (n != 7, n))[:3]]
    assert [answer for _, answer in pairs] == wanted and owner == [0] * 3 + [1] * 3
    assert set(seen[0][:20]) >= set(asking(MANY, 20).draw(EditBatch((OSLO,)))[0])
    one = asking(MANY, 3, screened=20)
    assert len(one.draw(EditBatch((OSLO,)))[0]) == 3, "who cannot screen draws what is asked"
    everything = asking(MANY, 400, screened=20)
    assert len(everything.draw(EditBatch((OSLO,)), sure)[0]) == 400 and len(seen) == 1


def earlier(preserved, request=CAIRO):
    return {prompt for prompt, _ in preserved.draw(EditBatch((request,)))[0]}


def test_earlier_edits_are_rehearsed_until_they_are_superseded():
    kept = Preserved((), PassesConfig(rehearsed=9))
    assert kept.asks and not earlier(kept)
    facts = [
        EditRequest("The mayor of Ulm is", "Ann", subject="Ulm", relation="mayor"),
        EditRequest("Ulm lies in", "Chad", subject="Ulm", relation="country"),
        EditRequest("Genoa has the port of", "Bari"),  # says neither its subject nor its relation
    ]
    kept.edited(facts)
    assert earlier(kept) == {f.prompt for f in facts}
    for request, left in [
        (EditRequest("Who leads Ulm?", "Bo", subject="Ulm", relation="mayor"), {1, 2}),
        (EditRequest("Who leads Ulm?", "Bo", subject="Ulm"), {2}),
        (EditRequest("Genoa belongs to", "Peru"), {0, 1}),
        (EditRequest("Ulm lies in", "Peru", subject="Ulm", relation="mayor"), {2}),
    ]:
        assert earlier(kept, request) == {facts[i].prompt for i in left}, request
        assert earlier(kept) == {f.prompt for f in facts}, "a trial decides nothing"
    kept.edited([EditRequest("Who leads Ulm?", "Bo", subject="Ulm", relation="mayor")])
    assert earlier(kept) == {"Who leads Ulm?", "Ulm lies in", "Genoa has the port of"}
    kept.reset()
    assert not earlier(kept)


def test_an_edit_asks_earlier_ones_beside_preserved_prompts():
    both = asking(MANY, 2, rehearsed=2, screened=8)
    both.edited(EditRequest(f"lamp {i} glows", "red") for i in range(6))
    pairs, owner = both.draw(EditBatch((OSLO, BONN)), lambda some: torch.rand(len(some)))
    assert owner == [0] * 4 + [1] * 4
    assert [answer == "red" for _, answer in pairs] == [False, False, True, True] * 2
    plain = Preserved(MANY, PassesConfig())
    assert not plain.asks and plain.draw(EditBatch((OSLO,))) == ([], [])


# An edit that asks them


def test_an_edit_is_done_when_preserved_prompts_hold_too(backbone):
    """The prompts that the same edit breaks when it does not ask them hold when it does."""
    after, rows = {}, {}
    bold = dataclasses.replace(config(0), updater=UpdaterConfig(eta=0.4, lam=1.0))
    for each in (0, 4):
        made = build_method(backbone, bold, preserve=PAIRS[3:])
        made.rollout.preserved = asking(PAIRS, each)
        outcome = made.rollout.step(EditBatch((CAIRO,)))
        assert outcome.held and outcome.mask.shape == (1, 4) and outcome.loss.shape == (1,)
        after[each], rows[each] = confidence(backbone, PAIRS), outcome.signals.edit.unique()
        assert confidence(backbone, [(CAIRO.prompt, CAIRO.target)]) > 0.9
        made.rollout.reset()
    assert after[0].min() < 0.5 < after[4].min()
    assert rows[0].tolist() == rows[4].tolist() == [0], "what is protected afterwards is the edit"


def test_preserved_prompts_take_the_modules_of_their_edit(backbone):
    selector = SelectorConfig("random", k=1)
    made = build_method(backbone, config(3, selector), preserve=PAIRS)
    made.rollout.passes = dataclasses.replace(made.rollout.passes, preserved_probability=1.0)
    masks = []
    made.rollout.updater.register_forward_pre_hook(lambda _, given: masks.append(given[1]))
    outcome = made.rollout.step(EditBatch((OSLO, BONN)))
    edits = torch.stack([m[:2] for m in masks]).amax(0)
    assert len(masks[0]) == 8 and edits.sum(1).tolist() == [1, 1]
    for mask in masks:
        assert (mask[2:5] <= edits[0]).all() and (mask[5:] <= edits[1]).all()
        assert (mask[2:].sum(1) == 1).all(), "a probability of 1 is never reached"
    assert torch.equal(outcome.mask, edits)


def test_training_asks_none(backbone):
    made = build_method(backbone, config(2), preserve=PAIRS)
    seen = []

    def on_pass(signals, action):
        seen.append(len(signals.loss))
        with torch.no_grad():
            return made.rollout.updater(signals, action.mask)

    made.rollout.step(EditBatch((OSLO,)), on_pass)
    assert seen and set(seen) == {1}


def test_prompts_that_hold_change_no_shift(backbone):
    """But for rounding: they are asked in the same forward pass."""
    made = build_method(backbone, config(0), preserve=PAIRS)
    plain = made.rollout.step(EditBatch((OSLO,)))
    made.rollout.reset()
    made.rollout.preserved = asking(PAIRS, 1)
    made.rollout.passes = dataclasses.replace(made.rollout.passes, preserved_probability=1e-30)
    asked = made.rollout.step(EditBatch((OSLO,)))
    assert asked.passes == plain.passes
    for name, shift in plain.shifts.items():
        torch.testing.assert_close(asked.shifts[name].dense(), shift.dense(), rtol=1e-3, atol=1e-5)


def test_an_edit_mends_earlier_ones_that_were_lost(backbone):
    """The least sure of what is drawn is found, asked and held again."""
    made = build_method(backbone, config(0, rehearsed=1, screened=4), preserve=PAIRS)
    rollout, first = made.rollout, EditRequest("Ink smells of", "Mali")
    rollout.step(EditBatch((first,)))
    rollout.step(EditBatch((CAIRO,)))
    kept, rollout.preserved = rollout.preserved, Preserved()
    rollout.step(EditBatch((dataclasses.replace(first, target="Chad"),)))  # nobody noted this one
    assert confidence(backbone, [(first.prompt, first.target)]) < 0.5
    rollout.preserved = kept
    for _ in range(2):
        outcome = rollout.step(EditBatch((EditRequest("Snow feels", "warm"),)))
        assert outcome.held
    assert confidence(backbone, [(first.prompt, first.target)]) > 0.5
    rollout.reset()


# Kept with the editor, and following the ledger


def test_a_saved_editor_asks_the_same(backbone, tmp_path):
    made = build_method(backbone, config(2), preserve=PAIRS)
    made.rollout.preserved = asking([("Zürich is in", "“Uri”"), *PAIRS], 2)
    loaded = load_editor(backbone, save_editor(made, tmp_path))
    copied = editor_of(backbone, made.config, editor_tensors(made))
    batch = EditBatch((OSLO, BONN))
    assert loaded.rollout.preserved.pairs == made.rollout.preserved.pairs
    for other in (loaded, copied):
        assert other.rollout.preserved.draw(batch) == made.rollout.preserved.draw(batch)


def test_damaged_pairs_are_an_error_with_the_file(backbone, tmp_path):
    made = build_method(backbone, config(2), preserve=PAIRS)
    tensors = editor_tensors(made) | {"preserved.pairs": torch.zeros(3, dtype=torch.uint8)}
    write_editor(tmp_path, made.config, backbone.names, tensors)
    with pytest.raises(ValueError, match="does not fit: preserved.pairs"):
        load_editor(backbone, tmp_path)


def test_a_method_that_preserves_needs_pairs(backbone):
    plain = dataclasses.replace(config(2), updater=UpdaterConfig(solver="outer"))
    with pytest.raises(ValueError, match=r"passes.preserved.*prompts with answers to preserve"):
        build_method(backbone, plain)


def test_an_editor_asks_nothing_about_its_edits_in_effect(knowing, tmp_path):
    """Known again when the ledger is opened, and asked again once the edit is reverted."""

    def open_editor():
        unedited = Backbone(copy.deepcopy(knowing), tiny_tokenizer(), MODULES)
        made = build_method(unedited, config(4, rehearsed=4), preserve=PAIRS)
        return Editor(made, tmp_path / "edits", Guard(max_kl=None, max_drift=None))

    def asks(editor, pair=PAIRS[0]):
        return pair in editor._rollout.preserved.draw(EditBatch((CAIRO,)))[0]

    request = EditRequest("The country where Rome is:", "Mali")
    other = EditRequest("Ink smells of", "Mali")
    with open_editor() as editor:
        assert asks(editor)
        ids = editor.edit([request])
        assert ids and not asks(editor) and asks(editor, (request.prompt, request.target))
    with open_editor() as editor:
        assert not asks(editor) and asks(editor, (request.prompt, request.target))
        editor.edit([other])
        editor.revert(ids)
        assert asks(editor) and not asks(editor, (request.prompt, request.target))
        editor.restore(ids)
        assert not asks(editor) and asks(editor, (request.prompt, request.target))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"preserved": -1}, "preserved=-1"),
        ({"rehearsed": -1}, "rehearsed=-1"),
        ({"screened": -2}, "screened=-2"),
        ({"preserved_probability": 0.0}, "preserved_probability=0.0"),
        ({"preserved_probability": 1.5}, r"preserved_probability=1.5: it must lie in \(0, 1\]"),
    ],
)
def test_bad_values_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        PassesConfig(**wrong)
