"""Where a calibration is used: once for a model, by the editor, runs and the command line."""

import dataclasses
import json

import pytest
import torch
from commands import METHOD, call, good, mistake, write
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import quick_run

from hiedit import calibrating
from hiedit.backbone.model import Backbone
from hiedit.backbone.modules import default_modules
from hiedit.calibration import Calibration, ModuleProfile, StepProfile, fingerprint, place, read
from hiedit.calibration import measure as measuring
from hiedit.catalogue import load_method
from hiedit.editor import Editor
from hiedit.ledger import Ledger
from hiedit.runconfig import ModelConfig
from hiedit.types import EditRequest
from hiedit.world import world_dir

pytestmark = pytest.mark.usefixtures("one_thread")

MODULES = ("model.layers.2.mlp.down_proj", "model.layers.5.mlp.down_proj")
FRANCE = EditRequest("The capital of France is", "Lyon")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("hiedit.calibration.profile.cache_dir", lambda: tmp_path / "cache")


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """The fingerprints of the models that were measured, in place of measuring them."""
    found = []

    def planted(model, tokenizer, requests, edits, progress, name, place, steps):
        found.append(fingerprint(model))
        assert steps == load_method("closed-form").updater
        progress("effects", 1, 1)
        return Calibration(
            model=name, fingerprint=found[-1], modules=MODULES, eta=0.07, edits=edits, known=edits,
            profiles=tuple(
                ModuleProfile(name=n, sink_ratio=1.0, gain=1.0, price=0.1) for n in MODULES
            ),
            steps=(StepProfile(eta=0.07, success=1.0, passes=2.0, kl=0.01),),
            versions={}, created="2026-01-01T00:00:00+00:00",
        )  # fmt: skip

    monkeypatch.setattr(calibrating, "calibrate", planted)
    return found


def loaded():
    model = AutoModelForCausalLM.from_pretrained(world_dir(), dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(world_dir())


def method(ledger) -> str:
    """A closed-form method that has little to measure before it starts, beside the ledger."""
    path = ledger.parent / "method.yaml"
    path.write_text(METHOD.replace("step: unit", "step: natural"))
    return str(path)


def opened(ledger, **options) -> Editor:
    return Editor.from_pretrained(*loaded(), method(ledger), ledger=ledger, **options)


def eta(editor) -> float:
    return editor._method.config.updater.eta


def test_an_unnamed_model_is_measured_once_and_edited_there(tmp_path, measured, capsys):
    with opened(tmp_path / "one") as editor:
        assert tuple(editor.modules) == MODULES and eta(editor) == 0.07
        assert editor.edit([FRANCE]) == [1]
        assert editor.verify()[0].ok
    assert "calibrating" in capsys.readouterr().err
    with opened(tmp_path / "two") as editor:
        assert tuple(editor.modules) == MODULES and eta(editor) == 0.07
    assert len(measured) == 1
    assert "calibrating" not in capsys.readouterr().err
    assert read(place(measured[0])).modules == MODULES


def test_a_ledger_keeps_the_calibration_that_it_was_begun_with(tmp_path, measured):
    with opened(tmp_path / "edits") as editor:
        editor.edit([FRANCE])
    place(measured[0]).unlink()
    with opened(tmp_path / "edits") as editor:
        assert tuple(editor.modules) == MODULES and eta(editor) == 0.07
    assert len(measured) == 1
    kept = tmp_path / "edits" / "calibration.json"
    kept.write_text(kept.read_text()[:40])
    with pytest.raises(ValueError, match="delete it") as error:
        opened(tmp_path / "edits")
    assert str(kept) in str(error.value)
    kept.unlink()  # the modules are the ledger's own
    with opened(tmp_path / "edits") as editor:
        assert tuple(editor.modules) == MODULES and eta(editor) != 0.07


@pytest.mark.parametrize(
    "options", [{"calibrate": False}, {"modules": ["model.layers.4.mlp.up_proj"]}]
)
def test_nothing_is_measured_where_modules_are_named_or_nobody_wants_it(
    tmp_path, measured, options
):
    with opened(tmp_path / "edits", **options) as editor:
        expected = options.get("modules") or default_modules(editor.model)
        assert editor.modules == expected and eta(editor) != 0.07
    assert not measured and not (tmp_path / "edits" / "calibration.json").exists()
    with opened(tmp_path / "edits") as editor:  # nor later
        assert editor.modules == expected and eta(editor) != 0.07
    assert not measured


def test_the_world_has_modules_of_its_own(tmp_path, measured):
    ledger = tmp_path / "edits"
    with Editor.from_pretrained("world", method=method(ledger), ledger=ledger) as editor:
        assert len(editor.modules) == 12
    assert not measured


def test_a_large_model_is_not_measured_without_being_asked_to(
    tmp_path, measured, monkeypatch, capsys
):
    monkeypatch.setattr(calibrating, "LARGEST", 1000)
    with opened(tmp_path / "edits") as editor:
        assert editor.modules == default_modules(editor.model)
    assert not measured and "hiedit calibrate" in capsys.readouterr().err
    calibrating.calibration_for(Backbone(*loaded()))  # asked to, and then it is used
    with opened(tmp_path / "others") as editor:
        assert tuple(editor.modules) == MODULES


def test_a_cache_that_cannot_be_written_to_is_said(tmp_path, measured, capsys):
    (tmp_path / "cache").write_text("a file")
    assert calibrating.calibration_for(Backbone(*loaded())).modules == MODULES
    assert "not kept" in capsys.readouterr().err


def test_a_run_takes_the_same(tmp_path, measured, capsys):
    unnamed = ModelConfig("w", str(world_dir()), None, "float32", "cpu")
    config = quick_run(tmp_path, model=unnamed)
    assert calibrating.measured(config).model.modules == list(MODULES)
    assert MODULES[1] in capsys.readouterr().out and len(measured) == 1
    assert calibrating.measured(
        dataclasses.replace(config, calibrate=False)
    ) == dataclasses.replace(config, calibrate=False)
    named = quick_run(tmp_path)
    assert calibrating.measured(named) is named and calibrating.named_already(named) is named
    world = quick_run(tmp_path, model=ModelConfig("w", "world", None, "float32", "cpu"))
    assert len(calibrating.named_already(world).model.modules) == 2  # those of configs/model
    assert calibrating.named_already(config).model.modules is None


def test_the_command_measures_shows_and_keeps(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "PRESERVE", 48)
    out = tmp_path / "c.json"
    arguments = ("calibrate", "--model", "world", "--edits", 2, "--out", out)
    text = good(call(*arguments))
    found = read(out)
    assert place(found.fingerprint).read_text() == out.read_text() and found.known == 2
    lines = text.splitlines()
    assert lines[0].split() == [
        "layer",
        "module",
        "sink",
        "ratio",
        "sink",
        "share",
        "gain",
        "price",
    ]
    assert len([line for line in lines if " down_proj " in line]) == 8
    assert len([line for line in lines if line.endswith("edited")]) == len(found.modules)
    assert len([line for line in lines if line.endswith("chosen")]) == 1
    again = json.loads(good(call("calibrate", "--model", "world", "--json")))  # as it is kept
    assert again["created"] == found.created and again["modules"] == list(found.modules)


def test_mistakes_of_the_command(tmp_path):
    mistake(call("calibrate", "--model", tmp_path / "none"), "no model there")
    mistake(call("calibrate", "--model", "world", "--input", tmp_path / "none.json"), "none.json")


def test_editing_without_it(tmp_path, measured):
    rows = tmp_path / "rows.jsonl"
    write(rows, {"prompt": FRANCE.prompt, "target": FRANCE.target})
    options = ("--model", world_dir(), "--input", rows, "--method", method(rows.parent / "edits"))
    good(call("edit", *options, "--ledger", tmp_path / "plain", "--no-calibrate"))
    assert not measured
    good(call("edit", *options, "--ledger", tmp_path / "edits"))
    assert len(measured) == 1
    with Ledger.read(tmp_path / "edits") as reader:
        assert tuple(reader.modules) == MODULES
