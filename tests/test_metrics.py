"""The fast metrics against real generation on the embedded world."""

from __future__ import annotations

import pytest
from worlds import MODULES, same, weights

from hiedit.evaluation.lifelong import StreamProbe
from hiedit.evaluation.metrics import agreement, answered, generate, locality_kl, locality_reference
from hiedit.experiment import load_backbone
from hiedit.methods import build_method, load_method
from hiedit.runconfig import ModelConfig
from hiedit.types import EditBatch, EditRequest
from hiedit.world import world_facts, world_requests

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(ModelConfig(modules=MODULES, device="cpu"))


@pytest.fixture(scope="module")
def requests():
    return world_requests("test")[:12]


@pytest.fixture
def edited(backbone, requests):
    """The model with a few edits in it, one of them to an answer that begins as another does."""
    method = build_method(backbone, load_method("ultraedit"))
    for i, request in enumerate(requests[:3]):
        method.rollout.step(EditBatch((request,), i))
    yield backbone
    method.rollout.reset()


def with_prefixes(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Every pair, with answers cut after a word or a letter, and with a word more."""
    more = []
    for prompt, answer in pairs:
        more += [(prompt, answer), (prompt, f"{answer} City"), (prompt, answer[:-1])]
        more += [(prompt, answer.rsplit(" ", 1)[0]), (prompt, answer.split("-")[0])]
    return [(p, a) for p, a in dict.fromkeys(more) if a.strip() == a and a]


def test_answered_equals_generation_and_exact_match(backbone, requests):
    """Right answers, wrong ones, and answers that are the beginning of others."""
    facts = {f.answer for f in world_facts()}
    shared = [a for a in facts if any(b.startswith(a) and a != b for b in facts)]
    assert "Niger" in shared and "French" in shared
    pairs = [(p, a) for r in requests for p, a in ((r.prompt, r.old_target), (r.prompt, r.target))]
    pairs += [(place.prompt, place.answer) for r in requests for place in r.locality[:1]]
    pairs += [("The capital of Nigeria is", "Niger"), ("The capital of Niger is", "Niamey")]
    pairs = with_prefixes(pairs)
    prompts = sorted({p for p, _ in pairs})
    said = dict(zip(prompts, generate(backbone, prompts), strict=True))
    expected = [said[prompt] == answer for prompt, answer in pairs]
    assert 12 <= sum(expected) < len(pairs) / 2
    got = answered(backbone, pairs, batch=48)
    asked = zip(pairs, got.exact.tolist(), expected, strict=True)
    wrong = [(pair, said[pair[0]]) for pair, one, other in asked if one != other]
    assert not wrong
    assert bool((got.accuracy[got.exact] == 1).all()) and got.accuracy.min() >= 0


def test_answered_equals_generation_after_edits(edited, requests):
    pairs = [(r.prompt, a) for r in requests for a in (r.target, r.old_target)]
    said = generate(edited, [p for p, _ in pairs])
    got = answered(edited, pairs).exact.tolist()
    for (prompt, answer), text, exact in zip(pairs, said, got, strict=True):
        ended = text[len(answer) :][:1] in ("", ".", ",", ";", ":", "!", "?", ")", '"', "'")
        assert exact == (text.startswith(answer) and ended), (prompt, answer, text)


def test_agreement_equals_two_generations(backbone, requests):
    prompts = [place.prompt for r in requests for place in r.locality[:2]]
    prompts += [p for r in requests for p in (*r.heldout, r.prompt)]
    prompts += ["Who is it?", "Once upon a time"]
    reference = locality_reference(backbone, prompts, [None] * len(prompts), batch=32)
    before = agreement(backbone, reference, len(prompts))
    assert bool(before.exact.all()) and bool((before.accuracy == 1).all())
    assert abs(locality_kl(backbone, reference)) < 1e-3
    method = build_method(backbone, load_method("ultraedit"))
    original = weights(backbone.model)
    try:
        for i, request in enumerate(requests[:3]):
            method.rollout.step(EditBatch((request,), i))
        after = agreement(backbone, reference, len(prompts))
        now = generate(backbone, prompts)
        assert locality_kl(backbone, reference) > 0
    finally:
        method.rollout.reset()
    assert same(weights(backbone.model), original)
    assert after.exact.tolist() == [a == b for (_, a), b in zip(reference.pairs, now, strict=True)]
    part = agreement(backbone, reference, 40)
    assert part.exact.tolist() == before.exact[:40].tolist()
    assert agreement(backbone, reference, 0).exact.shape == (0,)


def test_a_stream_without_paraphrases_and_locality_is_not_measured_there(backbone):
    probe = StreamProbe(backbone, [EditRequest("The capital of France is", "Paris")])
    scores = probe.before.scores()
    assert (scores.ES, scores.GS, scores.LS, scores.LS_gold) == (1.0, None, None, None)
