"""A whole run on the embedded world, small: its files, its trained editor, its mistakes."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from worlds import MODULES, quick, quick_run, records, same, weights

from hiedit import experiment
from hiedit import run as running
from hiedit.data.stream import StreamConfig
from hiedit.evaluation.lifelong import StreamProbe
from hiedit.evaluation.results import read_details, read_results
from hiedit.experiment import Hooks, complete_locality, load_backbone, load_data, run_method
from hiedit.methods import build_method, load_editor, save_editor
from hiedit.run import run
from hiedit.runconfig import DatasetConfig, ModelConfig
from hiedit.types import EditBatch, EditRequest, Locality
from hiedit.world import world_requests

pytestmark = pytest.mark.usefixtures("one_thread")

ROW_KEYS = (
    "method, seed, edits, ES, GS, LS, retention_ES, retention_GS, retention_LS, "
    "layers_per_edit, passes_per_edit, seconds_per_edit"
).split(", ")


@pytest.fixture(scope="module")
def base():
    """The embedded model; a test that edits it takes the edits back."""
    return load_backbone(ModelConfig(modules=MODULES, device="cpu"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two methods in this process: (its config, what it returned)."""
    config = quick_run(tmp_path_factory.mktemp("runs") / "one")
    return config, run(config, [quick("no-edit"), quick("hiedit")])


@pytest.fixture
def no_model(monkeypatch):
    """Loading any weights is a failure."""

    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(running, "load_backbone", refuse)
    monkeypatch.setattr(experiment, "load_backbone", refuse)


# ---- a run and what it leaves


def test_a_run_writes_its_results(finished):
    config, results = finished
    rows = read_results(config.run_dir)
    assert [row["method"] for row in rows] == ["no-edit", "hiedit"]
    assert [r.row() for r in results] == rows
    for row in rows:
        assert list(row)[: len(ROW_KEYS)] == ROW_KEYS
        assert row["edits"] == 4 and row["seed"] == 0
        for key in ROW_KEYS[3:9]:
            assert 0 <= row[key] <= 1, key
    control, hiedit = rows
    assert control["stream"] == hiedit["stream"]
    assert control["LS"] == control["before_LS"] == 1 and control["kl"] < 1e-3
    assert control["layers_per_edit"] == control["passes_per_edit"] == 0
    assert control["ES"] == control["before_ES"] == hiedit["before_ES"]
    assert 0 < hiedit["layers_per_edit"] <= len(MODULES) and hiedit["passes_per_edit"] >= 1
    assert hiedit["train_edits"] == 3 and hiedit["weight_growth"] > 0


def test_the_details_hold_curves_layers_and_examples(finished):
    config, results = finished
    details = read_details(config.run_dir)
    for detail, result in zip(details, results, strict=True):
        assert [point.edits for point in detail.curve] == [2, 4]
        assert detail.curve[-1].scores == detail.scores == result.scores
        assert len(detail.layer_frequency) == 4 and len(detail.examples) == 1
        assert detail.config["method"]["name"] == detail.method
    assert details[1].examples[0].after


def test_plots_training_curves_and_the_editor_are_there(finished):
    config, _ = finished
    names = {p.name for p in running.Path(config.run_dir).iterdir()}
    assert {"results.json", "details.json", "config.json", "training.json", "editors"} <= names
    assert any(name.endswith(".png") for name in names)
    training = json.loads((running.Path(config.run_dir) / "training.json").read_text())
    assert [step["edits"] for step in training["hiedit"]] == [1, 2, 3]
    editor = running.Path(config.run_dir) / "editors" / "hiedit"
    assert {p.name for p in editor.iterdir()} == {"editor.safetensors", "method.json"}


def test_a_saved_editor_does_what_the_run_did(finished, tmp_path):
    """It was saved as training left it, so the same stream gives the same numbers again."""
    config, (_, before) = finished
    editor = f"{config.run_dir}/editors/hiedit"
    (after,) = run(dataclasses.replace(config, run_dir=str(tmp_path / "again")), editor=editor)
    assert (after.method, after.scores, after.curve) == ("hiedit", before.scores, before.curve)
    assert after.kl == before.kl and after.weight_growth == before.weight_growth
    assert after.layer_frequency == before.layer_frequency
    assert not after.train_edits


def test_an_editor_for_other_modules_is_refused_before_a_model_is_loaded(
    finished, tmp_path, no_model
):
    config, _ = finished
    model = dataclasses.replace(config.model, modules=MODULES[:1])
    other = dataclasses.replace(config, model=model, run_dir=str(tmp_path))
    with pytest.raises(ValueError, match="trained for the modules .*up_proj.*editable ones are"):
        run(other, editor=f"{config.run_dir}/editors/hiedit")
    with pytest.raises(ValueError, match="holds no trained editor"):
        run(other, editor=str(tmp_path))


def test_a_stream_longer_than_its_records_is_an_error_before_a_model_is_loaded(tmp_path, no_model):
    config = quick_run(tmp_path, stream=StreamConfig(length=100_000))
    with pytest.raises(ValueError, match=r"100000.*\d+ facts"):
        run(config, [quick("no-edit")])
    path = tmp_path / "few.jsonl"
    rows = [{"prompt": f"The capital of {c} is", "target": "Oslo", "subject": c} for c in "ABCDE"]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="stream.length=4: there are only 1"):
        run(quick_run(tmp_path, dataset=records(path)), [quick("no-edit")])


# ---- editors, to the bit


def test_a_reloaded_editor_gives_the_same_masks_and_shifts(base, tmp_path):
    train = world_requests("train")[:8]
    method = build_method(base, quick("hiedit"), train, seed=3)
    original = weights(base.model)
    history = method.trainer(quick_run(tmp_path).train, 3).run(
        tuple(train), quick_run(tmp_path).train, 3
    )
    assert len(history) == 3 and same(weights(base.model), original)
    method.rollout.reset()
    save_editor(method, tmp_path)
    loaded = load_editor(base, tmp_path)
    assert loaded.config == method.config
    outcomes = []
    for parts in (method, loaded):
        steps = [parts.rollout.step(EditBatch((r,), i)) for i, r in enumerate(train[5:])]
        edited = weights(base.model)
        parts.rollout.reset()
        assert same(weights(base.model), original) and not same(edited, original)
        outcomes.append((steps, edited))
    (ours, weights_ours), (theirs, weights_theirs) = outcomes
    assert same(weights_ours, weights_theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.mask, other.mask) and one.passes == other.passes
        assert torch.equal(one.loss, other.loss) and list(one.shifts) == list(other.shifts)
        for name, shift in one.shifts.items():
            for part in ("A", "B", "scale"):
                assert torch.equal(getattr(shift, part), getattr(other.shifts[name], part))


def test_a_damaged_editor_is_named(base, tmp_path):
    save_editor(build_method(base, quick("no-edit")), tmp_path)
    tensors = (tmp_path / "editor.safetensors").read_bytes()
    (tmp_path / "editor.safetensors").write_bytes(tensors[:20])
    with pytest.raises(ValueError, match="editor.safetensors does not fit"):
        load_editor(base, tmp_path)
    (tmp_path / "editor.safetensors").write_bytes(tensors)
    (tmp_path / "method.json").write_text("{")
    with pytest.raises(ValueError, match="method.json is damaged"):
        load_editor(base, tmp_path)


def test_the_model_comes_back_unedited_also_after_an_error(base, tmp_path):
    config = quick_run(tmp_path)
    original = weights(base.model)
    data = load_data(config.dataset, config.stream)
    probe = StreamProbe(base, data.stream[:3], 32)
    parts = (base, data, probe, quick("closed-form"), config.train, config.evaluate)
    result, *_ = run_method(*parts)
    assert same(weights(base.model), original) and result.kl > 0

    def stop(done: int, total: int) -> None:
        assert not same(weights(base.model), original)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_method(*parts, hooks=Hooks(edit=stop))
    assert same(weights(base.model), original)


# ---- records without gold answers


def test_complete_locality_asks_the_unedited_model(base):
    france, spain = "The capital of France is", "The capital of Spain is"
    known = EditRequest("a", "b", locality=(Locality("c", "d"),))
    lacking = EditRequest("a", "b", locality=(Locality(france), Locality("c", "d")))
    later = EditRequest("a", "b", locality=(Locality(spain),))
    requests = (known, lacking, EditRequest("e", "f"), later)
    completed = complete_locality(base, requests, 3)
    assert completed[0] == known and completed[2:] == requests[2:]
    assert completed[1].locality == (Locality(france, "Paris"), Locality("c", "d"))
    assert complete_locality(base, requests, 9)[3].locality == (Locality(spain, "Madrid"),)
    assert complete_locality(base, requests[:1], 5) == requests[:1]
    silent = EditRequest("a", "b", locality=(Locality("Who is it?"),))
    assert complete_locality(base, [silent], 1)[0].locality[0].answer  # something to look at


@pytest.mark.parametrize("name", ["hiedit", "closed-form"])
def test_records_without_gold_answers(name, tmp_path):
    path = tmp_path / "fever.jsonl"
    rows = [
        {
            "prompt": r.prompt,
            "equiv_prompt": list(r.paraphrases),
            "alt": r.target,
            "unrel_prompt": r.locality[0].prompt,
            "unrel_ans": None,
        }
        for r in world_requests("train")[:30]
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    config = quick_run(tmp_path / name, dataset=records(path))
    (result,) = run(config, [quick(name)])
    assert result.scores.LS is not None and result.scores.LS_gold is None
    assert result.before.LS == 1 and result.layers_per_edit > 0


def test_subjects_of_the_records_may_be_left_out(tmp_path):
    path = tmp_path / "records.json"
    rows = [
        {
            "prompt": f"{who} was born in",
            "target": "Rome",
            "subject": who,
            "ground_truth": "Bonn",
        }
        for who in ("Ada", "Max", "Eve", "Kim")
    ]
    path.write_text(json.dumps(rows))
    given, left = (
        load_data(DatasetConfig("x", str(path), subjects=subjects), StreamConfig(length=1))
        for subjects in (True, False)
    )
    assert all(r.subject for r in (*given.train, *given.stream))
    assert not any(r.subject for r in (*left.train, *left.stream))
    assert [r.prompt for r in left.train] == [r.prompt for r in given.train]
