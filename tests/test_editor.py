"""The engineer's path on the embedded world: edit, revert, restore, reopen, refuse."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

import hiedit
from hiedit.backbone.model import Backbone
from hiedit.catalogue import load_method
from hiedit.config import UpdaterConfig
from hiedit.edited import COMMITTED, PREDICTED, REJECTED, SKIPPED
from hiedit.editor import Editor
from hiedit.guard import Guard, predict
from hiedit.ledger.errors import LedgerLocked
from hiedit.methods import build_method, save_editor
from hiedit.types import EditRequest, Shift
from hiedit.updaters.memory import lifelong_state
from hiedit.world import world_dir, world_stream
from hiedit.world.preserve import preservation_pairs

PRESERVE = preservation_pairs()[0][:32]
REQUESTS = world_stream("test", 6, seed=1)
FRANCE = EditRequest("The capital of France is", "Lyon", ("As its capital, France has",))


def opened(ledger, **options) -> Editor:
    options = {"method": "closed-form", "preserve": PRESERVE} | options
    return Editor.from_pretrained("world", ledger=ledger, **options)


def weights(editor) -> dict[str, torch.Tensor]:
    return {n: editor.model.get_submodule(n).weight.detach().clone() for n in editor.modules}


def assert_same(one, two):
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def memory(editor):
    return lifelong_state(editor._rollout.updater)


def answer(editor, prompt: str) -> str:
    tokens = editor.tokenizer(prompt, return_tensors="pt")
    out = editor.model.generate(**tokens, max_new_tokens=6, do_sample=False)
    return editor.tokenizer.decode(out[0, tokens.input_ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Six edits in one go: (ledger, weights, memory, ids)."""
    path = tmp_path_factory.mktemp("editor") / "edits"
    with opened(path) as editor:
        ids = editor.edit(REQUESTS)
        return path, weights(editor), memory(editor), ids


def test_an_edit_holds_and_can_be_taken_back(tmp_path):
    with opened(tmp_path / "edits") as editor:
        base = weights(editor)
        assert answer(editor, FRANCE.prompt).strip().startswith("Paris")
        (edit,) = editor.edit([FRANCE])
        assert answer(editor, FRANCE.prompt).strip().startswith("Lyon")
        record = editor.history()[0]
        assert (record.id, record.status, record.request) == (edit, "active", FRANCE)
        assert record.report["success"] == 1.0 and set(record.layers) <= set(editor.modules)
        after = weights(editor)
        assert editor.revert(edit) == [edit]
        assert answer(editor, FRANCE.prompt).strip().startswith("Paris")
        assert_same(weights(editor), base)
        editor.restore([edit])
        assert_same(weights(editor), after)
        assert isinstance(editor.model, type(Backbone(editor.model, None).model))
        assert not editor.model.model.layers[2].mlp.gate_proj._forward_hooks


def test_reopened_it_goes_on_as_if_it_had_never_stopped(whole, tmp_path):
    _, expected, remembered, ids = whole
    with opened(tmp_path / "edits") as editor:
        first = editor.edit(REQUESTS[:3])
    with opened(tmp_path / "edits") as editor:
        assert first + editor.edit(REQUESTS[3:]) == ids
        assert_same(weights(editor), expected)
        assert_same(memory(editor), remembered)


def test_after_a_crash_the_keys_of_all_edits_are_protected_again(whole, tmp_path):
    _, expected, remembered, _ = whole
    editor = opened(tmp_path / "edits")
    editor.edit(REQUESTS)
    editor.ledger.close()  # without the editor's own close: nothing of its memory is saved
    with opened(tmp_path / "edits") as again:
        assert_same(weights(again), expected)
        found = memory(again)
    for name in remembered:
        if name.endswith("precision"):
            torch.testing.assert_close(found[name], remembered[name], rtol=1e-4, atol=1e-5)


def test_another_editor_of_the_same_ledger_is_refused(tmp_path):
    with opened(tmp_path / "edits"):
        with pytest.raises(LedgerLocked, match="pid|process"):
            opened(tmp_path / "edits")


def test_identical_requests_are_skipped_and_conflicts_named(tmp_path):
    other = dataclasses.replace(FRANCE, target="Nice")
    with opened(tmp_path / "edits", guard=Guard(max_kl=None, max_drift=None)) as editor:
        (edit,) = editor.edit([FRANCE])
        before = weights(editor)
        (done,) = editor.apply([FRANCE])
        assert (done.status, done.id) == (SKIPPED, edit) and "in effect" in done.reasons[0]
        assert_same(weights(editor), before)
        with pytest.warns(UserWarning, match=f"edit {edit}"):
            (second,) = editor.edit([other])
        assert answer(editor, FRANCE.prompt).strip().startswith("Nice")
        # The last answer counts: the first request is no longer the one in effect.
        (third,) = editor.apply([FRANCE])
        assert third.status == COMMITTED and third.conflicts == (second,)
        assert editor.edit([FRANCE]) == [third.id]


@pytest.mark.parametrize(
    ("guard", "reason"),
    [
        (Guard(max_kl=0.0), "max_kl"),
        (Guard(max_kl=1.0, min_success=1.0), "min_success"),
    ],
    ids=["max_kl", "min_success"],
)
def test_a_guard_keeps_an_edit_out_and_says_why(tmp_path, guard, reason):
    # Held out, so it is asked and not edited; it is about something else, and not answered.
    other = ("To call Denmark, dial",)
    request = dataclasses.replace(FRANCE, paraphrases=other, heldout=other)
    with opened(tmp_path / "edits", guard=guard) as editor:
        base = weights(editor)
        (done,) = editor.apply([request])
        assert done.status == REJECTED and done.id is None and reason in done.reasons[0]
        with pytest.warns(UserWarning, match=reason):
            assert editor.edit([request]) == []
        assert_same(weights(editor), base)
        assert editor.history() == [] and not editor._env.pending


def test_the_prediction_is_what_the_commit_does(tmp_path):
    with opened(tmp_path / "edits") as editor:
        (told,) = editor.apply([REQUESTS[0]], dry_run=True)
        (done,) = editor.apply([REQUESTS[0]])
        assert (told.success, told.layers, told.passes) == (done.success, done.layers, done.passes)
        assert done.kl > 0 and told.kl > 0
        # The request is in the weights now: measured again, nothing pending changes anything.
        still = predict(editor._env, REQUESTS[0], local=True)
        assert still.success == done.success and still.local_kl == 0.0 < told.local_kl


def test_a_dry_run_changes_nothing(tmp_path):
    with opened(tmp_path / "edits") as editor:
        base, before = weights(editor), memory(editor)
        told = list(editor.apply(REQUESTS[:2], dry_run=True))
        assert [t.status for t in told] == [PREDICTED] * 2 and not any(t.id for t in told)
        assert_same(weights(editor), base)
        assert_same(memory(editor), before)
        assert editor.history() == []


@pytest.mark.parametrize("method", ["closed-form", "ultraedit"])  # with and without undo
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_never_reaches_a_weight(tmp_path, monkeypatch, bad, method):
    with opened(tmp_path / "edits", method=method) as editor:
        updater, base = editor._rollout.updater, weights(editor)
        name = editor.modules[0]
        rows, columns = base[name].shape
        broken = {name: Shift(torch.full((1, columns), bad), torch.ones(rows, 1))}
        monkeypatch.setattr(type(updater), "forward", lambda *_, **__: broken)
        (done,) = editor.apply([FRANCE])
        assert done.status == REJECTED and "finite" in done.reasons[0]
        assert_same(weights(editor), base)
        assert editor.history() == []


def test_verify_tells_which_edits_were_lost(tmp_path):
    with opened(tmp_path / "edits") as editor:
        ids = editor.edit([FRANCE, REQUESTS[0]])
        stored, held = editor.verify()
        assert stored.ok and held.checked == 2 and held.lost == ()
        assert held.success_now == held.success_then > 0
        with torch.no_grad():  # someone else overwrites what the first edit did
            for name, base in editor._env.state.base.items():
                editor.model.get_submodule(name).weight.copy_(base)
        assert set(editor.holding().lost) == set(ids)


def test_a_trained_policy_edits_as_it_was_saved(tmp_path):
    config = load_method("hiedit")
    updater = dataclasses.replace(config.updater, rank=4, preserve=32)
    selector = dataclasses.replace(config.selector, init="zero", hidden=4)
    config = dataclasses.replace(config, updater=updater, selector=selector)
    with opened(tmp_path / "plain") as editor:
        policy = save_editor(
            build_method(editor._env.backbone, config, preserve=PRESERVE), tmp_path / "policy"
        )
    with opened(tmp_path / "edits", policy=policy) as editor:
        (done,) = editor.apply([FRANCE])
        assert done.status == COMMITTED and 0 < len(done.layers) <= len(editor.modules)
        assert editor.method == "hiedit" and editor.history()[0].method == "hiedit"


def test_ultraedit_is_the_default_and_needs_no_training(tmp_path):
    with Editor.from_pretrained("world", ledger=tmp_path / "edits") as editor:
        assert editor.method == "ultraedit"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert editor.edit([FRANCE]) == [1]


def test_a_model_object_with_its_tokenizer(whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, expected, _, _ = whole
    model = AutoModelForCausalLM.from_pretrained(world_dir(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(world_dir())
    with pytest.raises(ValueError, match="tokenizer"):
        Editor.from_pretrained(model, ledger=path)
    with Editor.from_pretrained(model, tokenizer, "closed-form", ledger=path) as editor:
        assert editor.model is model  # its modules are those of the ledger
        assert_same(weights(editor), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rledit"}, "has to be trained first"),
        ({"method": "ultraedti"}, "did you mean 'ultraedit'"),
        ({"modules": ["model.layers.99.mlp.gate_proj"]}, "model.layers.99"),
        ({"dtype": "bfloat16"}, "bfloat16|dtype"),
        ({"policy": "nowhere"}, "nowhere"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_mistakes_are_named(whole, options, message):
    with pytest.raises(ValueError, match=message):
        opened(whole[0], **options)


@pytest.mark.parametrize(
    "values", [{"max_kl": -1.0}, {"min_success": 1.5}, {"min_success": float("nan")}], ids=str
)
def test_limits_that_make_no_sense(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Guard(**values)


def test_export_and_merged_checkpoint(whole, tmp_path):
    from transformers import AutoModelForCausalLM

    path, expected, _, _ = whole
    with opened(path) as editor:
        report = editor.export_adapter(tmp_path / "adapter")
        assert report.exact and {m.name for m in report.modules} <= set(editor.modules)
        editor.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert_same({n: merged.get_submodule(n).weight.detach() for n in expected}, expected)


def test_public_names():
    assert hiedit.Editor is Editor and hiedit.Guard is Guard
    assert UpdaterConfig().solver == "protected"  # what `closed-form` relies on
