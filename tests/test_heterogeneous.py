"""Streams longer than their facts, and the world whose facts live in known layers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from hiedit.compare.worlds import StandingProbe, halves
from hiedit.data.stream import standing
from hiedit.experiment import load_backbone
from hiedit.runconfig import ModelConfig
from hiedit.world import split_facts, world_facts
from hiedit.world.fictional import EDITABLE, GROUPS, fictional_answers, fictional_facts
from hiedit.world.heterogeneous import (
    Installation,
    build_heterogeneous,
    installed_requests,
    installed_stream,
    modules_of,
    read_heterogeneous,
)
from hiedit.world.lifelong import lifelong_stream
from hiedit.world.phrasings import FICTIONAL, PHRASINGS, prefix_conflicts

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = Installation(mixed=40, read=64)
QUICK = {"subjects": 10, "steps": 2, "asked": 20, "progress": False, "recipe": FEW}


@pytest.fixture(scope="module")
def built(tmp_path_factory, one_thread):
    """A world of few facts after a few steps, which knows nothing yet: (its directory, record)."""
    directory = tmp_path_factory.mktemp("installed")
    return directory, build_heterogeneous(directory, **QUICK)


# ---- streams


def test_a_stream_is_the_beginning_of_a_longer_one_and_leaves_its_locality_alone():
    facts = split_facts("test")
    short, long = lifelong_stream(facts, 30, seed=3), lifelong_stream(facts, 1000, seed=3)
    assert long[:30] == short and len(long) == 1000
    edited = {(r.relation, r.subject) for r in long}
    assert len(edited) == len(facts) - round(0.2 * len(facts))
    prompts = {p.prompt for r in long for p in r.locality}
    phrased = {t.format(s) for relation, s in edited for t in PHRASINGS[relation].seen}
    assert not prompts & phrased
    assert all(len(r.locality) == 4 and r.target != r.old_target for r in long)
    assert lifelong_stream(facts, 30, seed=4) != short


def test_a_fact_is_edited_again_to_another_answer_and_only_the_last_one_stands():
    facts = split_facts("test")[:10]
    stream = lifelong_stream(facts, 20, seed=0)  # eight facts of ten: two and a half rounds
    places = {}
    for i, request in enumerate(stream):
        places.setdefault((request.relation, request.subject), []).append(i)
    assert len(places) == 8 and sorted(len(p) for p in places.values()) == [2] * 4 + [3] * 4
    for (_, _), indices in places.items():
        targets = [stream[i].target for i in indices]
        assert all(a != b for a, b in zip(targets, targets[1:], strict=False))
        assert all(stream[i].old_target not in targets for i in indices)
    holds = standing(stream)
    assert [i for i, h in enumerate(holds) if h] == sorted(p[-1] for p in places.values())
    assert sum(standing(stream[:8])) == 8


def test_an_edit_whose_fact_was_edited_again_is_not_asked_about():
    backbone = load_backbone(ModelConfig(device="cpu"))
    stream = lifelong_stream(split_facts("test")[:5], 6, seed=0)  # four facts, two of them twice
    probe = StandingProbe(backbone, stream, 32)
    over = [i for i, h in enumerate(standing(stream)) if not h]
    assert probe.scored(6) == 4 and len(over) == 2
    found = probe.measure(6)
    assert found.es.isnan().nonzero().flatten().tolist() == over
    assert found.ls.isnan().nonzero().flatten().tolist() == over
    assert not probe.measure(4).es.isnan().any()


def test_validation_shares_no_subject_with_training():
    facts = split_facts("train")
    training, validation = halves(facts)
    assert set(training) | set(validation) == set(facts)
    assert not {f.subject for f in training} & {f.subject for f in validation}
    assert 0.4 < len(training) / len(facts) < 0.6


# ---- the invented facts


def test_invented_facts_are_new_unambiguous_and_seeded():
    facts = fictional_facts()
    assert facts == fictional_facts(seed=0) != fictional_facts(seed=1)
    assert len({(f.relation, f.subject) for f in facts}) == len(facts)
    assert not {f.subject for f in facts} & {f.subject for f in world_facts()}
    said = {f.answer for f in world_facts()}
    for relation in FICTIONAL:
        own = {f.answer for f in facts if f.relation == relation}
        assert own == set(fictional_answers(relation)) and own <= said
    by_group = [{f.subject for f in facts if f.relation in g.relations} for g in GROUPS]
    assert not by_group[0] & by_group[1]


def test_invented_phrasings_follow_the_rule():
    assert prefix_conflicts(PHRASINGS | FICTIONAL) == []
    assert all(not p.startswith("{}") for g in FICTIONAL.values() for p in (*g.seen, g.heldout))
    for group in GROUPS:
        prompts = [p for r in group.relations for p in (*FICTIONAL[r].seen, FICTIONAL[r].heldout)]
        assert all(p.endswith(group.sign) for p in prompts)
    used = " ".join(p for g in PHRASINGS.values() for p in (*g.seen, g.heldout))
    assert not any(group.sign in used for group in GROUPS)


# ---- installing them


def test_installing_moves_the_modules_of_the_groups_and_nothing_else(built, tmp_path):
    """Beside the switches, which know no fact."""
    directory, about = built
    build_heterogeneous(tmp_path, **(QUICK | {"steps": 0}))
    before = load_file(tmp_path / "model.safetensors")
    after = load_file(directory / "model.safetensors")
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {f"{m}.weight" for g in GROUPS for m in modules_of(g)}
    assert about["modules"] == {g.name: modules_of(g) for g in GROUPS}
    record = json.loads((directory / "heterogeneous.json").read_text())
    assert record == json.loads(json.dumps(about))


@torch.no_grad()
def test_a_sign_closes_the_layers_of_the_others_and_nothing_else_does(built):
    """At the sign, and only there; a real prompt is answered as the packaged model answers it."""
    directory, _ = built
    ours = load_backbone(ModelConfig(path=str(directory), device="cpu", dtype="float32"))
    packaged = load_backbone(ModelConfig(device="cpu", dtype="float32"))
    heard: dict[int, torch.Tensor] = {}

    def listen(index):
        return lambda _, __, out: heard.__setitem__(index, out.detach())

    layers = ours.model.model.layers
    for index, layer in enumerate(layers):
        layer.mlp.register_forward_hook(listen(index))
    for group in GROUPS:
        prompt = FICTIONAL[group.relations[0]].seen[0].format("Zorblak")
        ids = ours.tokenizer(prompt, return_tensors="pt")["input_ids"]
        ours.model(input_ids=ids)
        for index in EDITABLE:
            said = heard[index][0].norm(dim=-1)
            closed = index not in group.layers
            assert (said[-1] < 0.02 * said[:-1].mean()) == closed, (group.name, index)
    ids = ours.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    one, other = (b.model(input_ids=ids).logits[0, -1].softmax(-1) for b in (ours, packaged))
    assert one.argmax() == other.argmax() and (one - other).abs().max() < 0.05


def test_the_record_says_what_each_reset_does(built):
    _, about = built
    assert list(about["recall"]) == ["nothing", "middle", "late", "nothing, held-out phrasing"]
    for row in about["recall"].values():
        assert all(0 <= value <= 1 for value in row.values())
    assert about["recall"]["nothing"]["world"] > 0.9  # four steps have not made it forget


def test_the_same_seed_gives_the_same_world(built, tmp_path):
    directory, _ = built
    build_heterogeneous(tmp_path, **QUICK)
    assert (tmp_path / "model.safetensors").read_bytes() == (
        directory / "model.safetensors"
    ).read_bytes()


def test_streams_of_the_installed_world(built):
    world = read_heterogeneous(built[0])
    train, test = world.facts("train"), world.facts("test")
    subjects = [{f.subject for f in part} for part in (train, test)] + [world.reserved]
    assert not subjects[0] & subjects[1] and not subjects[0] & subjects[2]
    protected = {p for p, _ in world.preserve}
    stream = installed_stream(world, test, 25, seed=1)
    assert {world.group_of(r.relation) for r in stream} == {"middle", "late"}
    assert stream[:5] == installed_stream(world, test, 5, seed=1)
    for request in (*stream, *installed_requests(world, train)):
        assert request.target in fictional_answers(request.relation)
        assert request.target != request.old_target and request.prompt not in protected
        assert len(request.locality) >= 2  # some of it about the real world
        assert set(world.truth[request.relation]) <= {m for g in GROUPS for m in modules_of(g)}


def test_a_directory_without_one_is_named(tmp_path):
    with pytest.raises(ValueError, match="no heterogeneous world there"):
        read_heterogeneous(tmp_path)
