"""Calibration: the rules on planted numbers, the file, planted sinks, a real measurement."""

import dataclasses
import json
import math

import pytest
import torch
from models import LAYERS, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import same, weights

from hiedit.calibration import (
    Calibration,
    ModuleProfile,
    StepProfile,
    cached,
    calibrate,
    calibrated,
    choose,
    choose_step,
    eligible,
    fingerprint,
    place,
    read,
    write,
)
from hiedit.calibration import measure as measuring
from hiedit.catalogue import load_method
from hiedit.config import Place
from hiedit.types import EditRequest, Locality
from hiedit.world import world_dir, world_requests

pytestmark = pytest.mark.usefixtures("one_thread")

DOWN = "model.layers.{}.mlp.down_proj"
FRANCE = EditRequest(
    "The capital of France is", "Lyon", ("As its capital, France has",),
    (Locality("The capital of Japan is", "Tokyo"),), subject="France", old_target="Paris",
)  # fmt: skip
ITALY = EditRequest(
    "The capital of Italy is", "Milan", ("As its capital, Italy has",),
    (Locality("The capital of Spain is", "Madrid"),), subject="Italy", old_target="Rome",
)  # fmt: skip


def profile(name, gain=1.0, price=0.1, ratio=2.0, share=0.0) -> ModuleProfile:
    return ModuleProfile(name=name, sink_ratio=ratio, gain=gain, price=price, sink_share=share)


def step(eta, success=1.0, kl=0.1) -> StepProfile:
    return StepProfile(eta=eta, success=success, passes=3.0, kl=kl)


def planted_calibration(**changes) -> Calibration:
    values = dict(
        model="tiny", fingerprint="f" * 64, modules=("a", "b"), eta=0.2,
        profiles=(profile("a"), profile("b", gain=math.nan, price=math.nan), profile("c")),
        edits=4, versions={"python": "3"}, created="2026-01-01T00:00:00+00:00",
        steps=(step(0.1), step(0.2)), known=3, seconds=1.5,
    )  # fmt: skip
    return Calibration(**(values | changes))


# ---- the rules


def test_modules_that_gain_most_for_their_price_are_chosen_in_their_order():
    profiles = [
        profile("poor", gain=0.3, price=0.0),  # less than a third of the best, for nothing
        profile("dear", gain=1.0, price=1.0),
        profile("cheap", gain=0.6, price=0.01),
        profile("best", gain=1.2, price=0.02),
    ]
    assert choose(profiles, 2) == ("cheap", "best")
    assert choose(profiles, 3) == ("dear", "cheap", "best")
    assert choose(profiles, 9) == ("dear", "cheap", "best")


@pytest.mark.parametrize("sink", [{"ratio": 5.0}, {"share": 0.6}], ids=["input", "output"])
def test_modules_that_sinks_own_are_left_out(sink):
    owned = profile("sink", gain=9.0, price=0.0, **sink)
    profiles = [profile("x"), owned, profile("y"), profile("z")]
    assert choose(profiles) == ("x", "y", "z")  # nor does it say what the best gain is


def test_there_is_always_a_choice():
    worse, bad = profile("worse", ratio=90.0), profile("bad", ratio=7.0)
    assert choose([worse, profile("good"), bad, profile("fine")]) == ("good", "bad", "fine")
    assert choose([worse, profile("dear", price=9.0, ratio=6.0), bad], 2) == ("worse", "bad")
    assert choose([profile("a", gain=-0.2), profile("b", gain=-0.1)], 1) == ("b",)
    assert choose([profile("a", gain=math.nan), profile("b")]) == ("b",)
    assert choose([profile("a", gain=math.nan), profile("b", gain=math.nan, ratio=1.0)], 1)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([step(0.1, kl=0.10), step(0.2, kl=0.13), step(0.3, kl=0.14)], 0.2),  # at most 0.135
        ([step(0.1, 0.99), step(0.2, 0.98), step(0.3, 0.9)], 0.2),
        ([step(0.1, 0.2, kl=0.0), step(0.2, kl=0.3), step(0.3, kl=0.35)], 0.3),
        ([step(0.1), step(0.2, kl=math.nan)], 0.1),
        ([step(0.1, kl=math.nan), step(0.2, kl=math.nan)], 0.1),
    ],
    ids=["kl", "success", "a step that does nothing is no bound", "nan", "all nan"],
)
def test_the_largest_step_that_costs_no_more(steps, expected):
    assert choose_step(steps) == expected
    assert choose_step(steps[::-1]) == expected


def test_the_step_is_for_methods_with_such_steps():
    found = planted_calibration(eta=0.45)
    closed = load_method("closed-form")
    assert calibrated(closed, found).updater.eta == 0.45
    assert dataclasses.replace(calibrated(closed, found), updater=closed.updater) == closed
    assert calibrated(closed, None) == closed
    for name in ("ultraedit", "no-edit", "ft"):
        assert calibrated(load_method(name), found) == load_method(name)


# ---- the file


def test_a_calibration_comes_back_as_it_was_written(tmp_path):
    found = planted_calibration()
    path = write(found, tmp_path / "new" / "c.json")
    back = read(path)
    assert math.isnan(back.profiles[1].gain) and "NaN" not in path.read_text()
    assert repr(back) == repr(found)
    assert [p.name for p in path.parent.iterdir()] == ["c.json"]


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = write(planted_calibration(), tmp_path / "c.json")
    before = path.read_bytes()

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write(planted_calibration(eta=0.3), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"eta": 0.2,\n "profiles"', '"eta": null,\n "profiles"'),
        lambda text: text.replace('"modules"', '"modulos"'),
        lambda text: text.replace('"edits"', '"edit"'),
    ],
    ids=["cut", "empty", "list", "format", "eta", "modules", "key"],
)
def test_a_damaged_file_is_named(tmp_path, damage):
    path = write(planted_calibration(), tmp_path / "c.json")
    text = damage(path.read_text())
    assert text != path.read_text()
    path.write_text(text)
    with pytest.raises(ValueError, match="delete it") as error:
        read(path)
    assert str(path) in str(error.value)


def test_a_file_of_another_model_is_not_taken():
    write(planted_calibration(), place("0" * 64))
    with pytest.raises(ValueError, match="another model"):
        cached("0" * 64)
    assert cached("1" * 64) is None


def test_the_fingerprint_is_of_the_model():
    model = tiny_model("llama")
    first = fingerprint(model)
    model.config._name_or_path = "elsewhere"
    assert fingerprint(model) == fingerprint(tiny_model("llama")) == first
    assert fingerprint(tiny_model("llama", seed=1)) != first
    assert fingerprint(tiny_model("llama", rms_norm_eps=1e-3)) != first
    with torch.no_grad():
        model.get_submodule(DOWN.format(LAYERS - 1)).weight[3, 5] += 1e-4
    assert fingerprint(model) != first


# ---- measuring


def with_sink(layer: int):
    """A tiny Llama whose ``layer`` gives the first token (always ``<s>``) a key some hundreds of
    times as long as the others': a direction of its own that nothing else writes to."""
    model = tiny_model("llama")
    with torch.no_grad():
        table = model.model.embed_tokens.weight
        table[:, 0] = 0.0
        table[1] = 0.0
        table[1, 0] = 3.0
        for block in model.model.layers:
            block.self_attn.o_proj.weight[0] = 0.0
            block.mlp.down_proj.weight[0] = 0.0
        mlp = model.model.layers[layer].mlp
        mlp.gate_proj.weight[:, 0] = 5.0
        mlp.up_proj.weight[:, 0] = 5.0
    return model


@pytest.mark.parametrize("layer", [1, 2])
def test_a_module_that_a_sink_owns_is_left_out(layer):
    model = with_sink(layer)
    before = weights(model)
    found = calibrate(model, tiny_tokenizer(), [FRANCE, ITALY], edits=2)
    ratios = {p.name: p.sink_ratio for p in found.profiles}
    shares = {p.name: p.sink_share for p in found.profiles}
    assert list(ratios) == [DOWN.format(i) for i in range(LAYERS)]
    assert ratios.pop(DOWN.format(layer)) > 50 and max(ratios.values()) < 5
    assert shares.pop(DOWN.format(layer)) > 0.9
    assert DOWN.format(layer) not in found.modules and found.modules
    assert [math.isnan(p.gain) for p in found.profiles] == [i == layer for i in range(LAYERS)]
    assert same(weights(model), before)
    assert not any(m._forward_hooks for m in model.modules())


def test_the_world_is_measured(monkeypatch):
    monkeypatch.setattr(measuring, "LAYERS", 3)  # several parts, of unequal size
    monkeypatch.setattr(measuring, "PRESERVE", 48)
    model = AutoModelForCausalLM.from_pretrained(world_dir(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(world_dir())
    told = []
    found = calibrate(
        model, tokenizer, edits=2, progress=lambda *said: told.append(said), name="world",
        place=Place("answer", 0),
    )  # fmt: skip
    assert found.known == found.edits == 2 and found.model == "world"
    assert found.fingerprint == fingerprint(model)
    assert [p.name for p in found.profiles] == [DOWN.format(i) for i in range(8)]
    finite = [p for p in found.profiles if math.isfinite(p.gain)]
    assert finite == eligible(found.profiles) and all(p.price >= -1e-6 for p in finite)
    assert max(p.gain for p in found.profiles if p.name in found.modules) > 0.1
    assert [s.eta for s in found.steps] == list(measuring.ETAS) and found.eta in measuring.ETAS
    assert all(0 <= s.success <= 1 for s in found.steps)
    assert all(1 <= s.passes <= measuring.PASSES.max for s in found.steps)
    assert told[-1] == ("steps", 8, 8) and ("effects", 8, 8) in told


def test_facts_that_the_model_knows_come_first():
    model = AutoModelForCausalLM.from_pretrained(world_dir(), dtype=torch.float32)
    backbone = measuring.Backbone(model, AutoTokenizer.from_pretrained(world_dir()), "*.3.mlp.*")
    right = world_requests("train")[:3]
    wrong = [dataclasses.replace(r, old_target="Zzyzx") for r in world_requests("train")[3:6]]
    unasked = dataclasses.replace(wrong[0], old_target=None)
    some, known = measuring.known_first(backbone, [unasked, *wrong, *right], 5, lambda *said: None)
    assert known == 3 and some == [*right, unasked, wrong[0]]


def test_the_step_is_of_the_method_that_edits(monkeypatch):
    """Its trust region, too: within a narrow one nothing moves."""
    monkeypatch.setattr(measuring, "ETAS", (0.3,))
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    method = load_method("closed-form").updater
    narrow, wide = (
        calibrate(
            model, tokenizer, [FRANCE, ITALY], edits=2,
            steps=dataclasses.replace(method, trust_region=region),
        ).steps[0].kl
        for region in (1e-20, method.trust_region)
    )  # fmt: skip
    assert narrow < 1e-6 and wide > 100 * narrow


def test_no_request_to_measure_with_is_an_error():
    with pytest.raises(ValueError, match="no edits to measure with"):
        calibrate(tiny_model("llama"), tiny_tokenizer(), [])


def test_json_is_what_is_kept():
    values = json.loads(planted_calibration().as_json())
    assert values["modules"] == ["a", "b"] and values["profiles"][1]["gain"] is None
