"""`hiedit demo` and `dataset=known`: what a model is asked for, the records, what is printed."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest

from hiedit import demo, known
from hiedit.catalogue import load_method
from hiedit.data.stream import StreamConfig
from hiedit.evaluation.report import everyday_lines, legend
from hiedit.evaluation.results import MethodResult, Said, from_plain, plain
from hiedit.evaluation.scores import Scores
from hiedit.experiment import KNOWN, load_backbone, load_data
from hiedit.runconfig import DatasetConfig, ModelConfig
from hiedit.world import known as phrased
from hiedit.world.phrasings import PHRASINGS

FEW = ("capital", "continent")


@pytest.fixture
def as_the_world_says(monkeypatch):
    """The embedded model was trained on other phrasings, so it is asked in its own."""
    own = {name: PHRASINGS[name].seen[:3] for name in FEW}
    monkeypatch.setattr(phrased, "PHRASED", own)
    return own


@pytest.fixture(scope="module")
def world():
    return load_backbone(ModelConfig(modules=["model.layers.{2-4}.mlp.gate_proj"], dtype="float32"))


def test_phrasings_leave_one_blank_and_none_begins_another():
    prompts = [p for group in phrased.PHRASED.values() for p in group]
    assert all(len(set(group)) == 3 for group in phrased.PHRASED.values())
    assert all(p.count("{}") == 1 and not p.startswith("{}") and p.strip() == p for p in prompts)
    pairs = itertools.permutations(prompts, 2)
    assert not [(a, b) for a, b in pairs if b.startswith(a)]


def test_no_subject_is_for_two_purposes():
    facts = phrased.askable(seed=3)
    subjects = [{f.subject for f in part} for part in (facts.test, facts.train, facts.reserved)]
    assert all(len(s) > 50 for s in subjects)
    assert not any(a & b for a, b in itertools.combinations(subjects, 2))
    assert phrased.askable(seed=4).test != facts.test
    assert set(phrased.askable(seed=4).test) == set(facts.test)


@pytest.mark.parametrize("measured", [True, False])
def test_requests(measured):
    facts = phrased.askable().test
    edited, others = facts[:30], facts[30:60]
    requests = phrased.known_requests(edited, others, measured=measured)
    assert [(r.relation, r.subject, r.old_target) for r in requests] == [
        (f.relation, f.subject, f.answer) for f in edited
    ]
    about = {p: f for f in others for p in phrased.prompts_of(f)}
    for request, fact in zip(requests, edited, strict=True):
        said = (request.prompt, *(request.heldout if measured else request.paraphrases))
        assert sorted(said) == sorted(phrased.prompts_of(fact)) and request.target != fact.answer
        assert not (request.paraphrases if measured else request.heldout)
        assert len(request.locality) == phrased.LOCALITY
        near = [about[place.prompt] for place in request.locality]
        assert [f.answer for f in near] == [place.answer for place in request.locality]
        same = [f for f in others if f.relation == fact.relation or f.subject == fact.subject]
        assert set(near) <= set(same) or set(same) <= set(near)


def test_a_model_is_asked_in_every_phrasing(world, as_the_world_says):
    facts = [f for f in phrased.askable().test if f.relation == "capital"][:6]
    wrong = dataclasses.replace(facts[0], answer="Atlantis")
    assert known.knows(world, [wrong, *facts[1:]]) == facts[1:]
    other = {"capital": (*as_the_world_says["capital"][:2], "My aunt has been to {} and likes")}
    as_the_world_says.update(other)
    assert known.knows(world, facts) == []


def test_it_is_asked_for_no_more_than_is_wanted(world, as_the_world_says, monkeypatch):
    monkeypatch.setattr(known, "BATCH", 4)
    told = []
    facts = phrased.askable().test
    found, asked = known.first_known(world, facts, 6, lambda *at: told.append(at))
    assert found == list(facts[:6]) and asked == 8 and told[0] == (0, 6) and told[-1] == (6, 6)


def test_a_model_that_knows_too_little(world, as_the_world_says):
    as_the_world_says.pop("capital")
    with pytest.raises(ValueError, match=r"stream.length=9999: of \d+ facts the model knows \d+"):
        known.known_data(world, StreamConfig(length=9999), 2)


def test_records_are_files_like_any_others(world, as_the_world_says, tmp_path):
    data = known.known_data(world, StreamConfig(length=5, seed=1), train=3)
    assert len(data.stream) == 5 and len(data.train) == known.EFFECTS
    place = known.write(data, tmp_path / "known")
    read = load_data(DatasetConfig("known", str(place)), StreamConfig(length=5, shuffle=False))
    assert (read.train, read.stream, read.preserve) == (data.train, data.stream, data.preserve)
    edited = {r.subject for r in data.stream}
    assert not edited & {r.subject for r in data.train}
    asked = {(r.relation, r.subject) for r in data.stream}
    places = [place.prompt for r in data.stream for place in r.locality]
    prompts = {p for r in data.stream for p in (r.prompt, *r.heldout)}
    assert asked and not prompts & set(places)
    (place / "preserve.json").write_text('["a"]')
    with pytest.raises(ValueError, match="preserve.json: it must be a list of .prompt, answer."):
        load_data(DatasetConfig("known", str(place)), StreamConfig(length=5))


def test_who_cannot_ask_is_told_what_to_give():
    with pytest.raises(ValueError, match="dataset.path='known'.*RUN_DIR/known"):
        load_data(DatasetConfig("known", KNOWN), StreamConfig(length=5))


RESULT = MethodResult("mine", 0, 8, Scores(1.0, 0.5, 0.9), layers_per_edit=2.0)
SAID = (Said("The sun is a", "star", "star"), Said("Bees make", "honey", "Paris"))


def test_what_is_said_beside_the_edits_survives_the_way_to_json_and_back():
    result = dataclasses.replace(RESULT, everyday=SAID)
    assert from_plain(json.loads(json.dumps(plain(result)))) == from_plain(plain(result))
    assert from_plain(plain(result)).everyday == SAID


def test_everyday_prompts_are_printed_by_method():
    control = dataclasses.replace(RESULT, method="no-edit", layers_per_edit=0, everyday=SAID)
    other = dataclasses.replace(RESULT, method="ultraedit", everyday=SAID)
    lines = everyday_lines([control, dataclasses.replace(RESULT, everyday=SAID), other])
    assert lines[1:4] == [
        '  The sun is a: "star"',
        "    mine       the same",
        "    ultraedit  the same",
    ]
    assert lines[4:] == ['  Bees make: "honey"', '    mine       "Paris"', '    ultraedit  "Paris"']
    assert everyday_lines([control]) == [] == everyday_lines([RESULT])


def test_what_the_guard_kept_out_and_plain_text_are_told_where_there_was_a_guard():
    read = dataclasses.replace(RESULT, perplexity_before=20.0, perplexity_after=20.5)
    assert not [line for line in legend([read]) if "guard" in line or "Perplexity" in line]
    text = "\n".join(legend([dataclasses.replace(read, rejected=3)]))
    assert "mine 3" in text and "20.00 before editing: mine 20.50" in text
    assert "docs/metrics.md" in text


METHOD = """
name: quick
selector: {kind: all}
updater: {kind: closed_form, solver: protected, normalise: none, step: unit, tokens: answer,
          eta: 0.1, preserve: 64}
objective: {kind: none}
passes: {max: 6, target_probability: 0.8}
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    testing = pytest.importorskip("typer.testing", reason="the command line needs typer")
    pytest.importorskip("hydra", reason="the command line needs hydra")
    from hiedit.cli import app

    monkeypatch.chdir(tmp_path)
    return lambda *arguments: testing.CliRunner().invoke(app, ["demo", *map(str, arguments)])


def test_the_demo_on_a_model(call, as_the_world_says, tmp_path):
    (tmp_path / "quick.yaml").write_text(METHOD)
    result = call(
        "--model", "world", "--edits", 4, "--train", 0, "--methods", "no-edit,quick.yaml",
        "--jobs", 1, "--tracking", "off",
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    rows = {
        row["method"]: row for row in json.loads((tmp_path / "runs/demo/results.json").read_text())
    }
    assert rows["no-edit"]["ES"] == 0 and rows["no-edit"]["before_LS_known"] == 1.0
    assert rows["quick"]["ES"] == 1.0 and rows["quick"]["edits"] == 4
    assert len(json.loads((tmp_path / "runs/demo/known/stream.json").read_text())) == 4
    text = " ".join(result.output.split())
    assert "was asked for" in text and "Edits by quick, before" in text
    assert all(prompt in text for prompt in demo.EVERYDAY)
    assert result.output.count("held-out phrasing") == 4 and "docs/metrics.md" in text


def test_mistakes(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HIEDIT_CACHE", str(tmp_path / "empty"))
    for arguments, parts in (
        ((), ("hiedit models get smollm2-135m", "--world")),
        (("--model", "no/such"), ("model.path='no/such'",)),
        (("--workers", "2"), ("--workers=2", "--world")),
        (("--world", "--model", "mine"), ("--model='mine'", "--world")),
        (("--model", "world", "--edits", "0"), ("stream.length=0",)),
    ):
        result = call(*arguments)
        assert result.exit_code == 2 and result.stderr.startswith("error: "), result.output
        assert all(part in result.stderr for part in parts), result.stderr
        assert result.stderr.count("\n") == 1


def test_with_world_it_is_the_demo_of_the_world(call, monkeypatch):
    from hiedit.distributed import executors

    given = []
    monkeypatch.setattr(
        executors, "execute", lambda config, methods, jobs: given.append((config, methods))
    )
    assert call("--world", "--workers", 0, "--edits", 7).exit_code == 0
    config, methods = given[0]
    assert (config.model.path, config.dataset.path, config.stream.length) == ("world", "world", 7)
    assert config.train.edits == 100 and config.run_dir == "runs/demo-world"
    assert [m.name for m in methods] == list(demo.WORLD_METHODS)
    assert not config.evaluate.everyday


def test_it_protects_less_and_edits_as_ever():
    method = load_method("closed-form")
    quick = demo.quicker(method)
    assert (quick.updater.preserve, quick.updater.own_text) == (demo.PROTECTED, demo.OWN_TEXT)
    kept = {"preserve": method.updater.preserve, "own_text": method.updater.own_text}
    assert dataclasses.replace(quick.updater, **kept) == method.updater
    plain_one = load_method("ultraedit")
    assert demo.quicker(plain_one).updater.own_text == plain_one.updater.own_text == 0


def test_hiedit_for_real_models_edits_where_the_default_does():
    learned, usual = load_method("hiedit-real").updater, load_method("closed-form").updater
    place = ("step", "tokens", "contexts", "subject_alone")
    kept = ("absorb", "preserve", "preserve_tokens", "preserve_subjects", "own_text", "eps", "lam")
    alike = ("solver", "normalise", *place, *kept)
    for key in alike:  # what makes its protection the same, which is measured once for both
        assert getattr(learned, key) == getattr(usual, key), key
