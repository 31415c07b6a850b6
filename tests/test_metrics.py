"""The fast metrics against real generation on the embedded world."""

from __future__ import annotations

import pytest
import torch
from worlds import MODULES, same, weights

from hiedit.catalogue import load_method
from hiedit.evaluation.lifelong import StreamProbe
from hiedit.evaluation.metrics import answered
from hiedit.evaluation.words import match
from hiedit.experiment import load_backbone
from hiedit.methods import build_method
from hiedit.runconfig import ModelConfig
from hiedit.types import EditBatch, EditRequest, Locality
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
    method = build_method(backbone, load_method("closed-form"), world_requests("train")[:200])
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


def greedy_text(backbone, prompt: str, tokens: int = 16) -> str:
    """What a plain generation loop says, token by token, up to the end of text."""
    tokenizer = backbone.tokenizer
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(tokens):
        logits = backbone.model(input_ids=torch.tensor([ids])).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] in tokenizer.all_special_ids:
            ids.pop()
            break
    return tokenizer.decode(ids[start:])


def same_as_generation(backbone, pairs) -> tuple[int, int]:
    """Asserts that ``answered`` says what the text of a generation loop does; how many begin with
    the answer and how many end there."""
    said = {prompt: greedy_text(backbone, prompt) for prompt in {p for p, _ in pairs}}
    expected = [match(said[prompt], answer) for prompt, answer in pairs]
    got = answered(backbone, pairs, batch=48)
    asked = zip(pairs, got.begins.tolist(), got.exact.tolist(), expected, strict=True)
    wrong = [(p, said[p[0]]) for p, one, two, m in asked if (one, two) != (m.begins, m.ends)]
    assert not wrong
    assert got.accuracy.min() >= 0 and not bool((got.exact & ~got.begins).any())
    return int(got.begins.sum()), int(got.exact.sum())


def test_answered_equals_generation(backbone, requests):
    """Right answers, wrong ones, and answers that are the beginning of others."""
    facts = {f.answer for f in world_facts()}
    shared = [a for a in facts if any(b.startswith(a) and a != b for b in facts)]
    assert "Niger" in shared and "French" in shared
    pairs = [(p, a) for r in requests for p, a in ((r.prompt, r.old_target), (r.prompt, r.target))]
    pairs += [(place.prompt, place.answer) for r in requests for place in r.locality[:1]]
    pairs += [("The capital of Nigeria is", "Niger"), ("The capital of Niger is", "Niamey")]
    pairs = with_prefixes(pairs)
    begins, ends = same_as_generation(backbone, pairs)
    assert 12 <= ends <= begins < len(pairs) / 2


def test_answered_equals_generation_after_edits(edited, requests):
    pairs = [(r.prompt, a) for r in requests for a in (r.target, r.old_target)]
    begins, _ = same_as_generation(edited, pairs)
    assert 0 < begins < len(pairs)


def test_locality_equals_two_generations(backbone, requests):
    near = [place for r in requests for place in r.locality[:2]]
    prompts = [p for r in requests for p in (*r.heldout, r.prompt)]
    near += [Locality(p) for p in (*prompts, "Who is it?", "Once upon a time")]
    asked = [EditRequest("The capital of France is", "Lyon", locality=(p,)) for p in near]
    before = [words(backbone, p) for p in near]
    probe = StreamProbe(backbone, asked, batch=32)
    assert bool((probe.before.ls == 1).all()) and bool((probe.before.ls_tf == 1).all())
    assert abs(probe.kl()) < 1e-3
    method = build_method(backbone, load_method("closed-form"), world_requests("train")[:200])
    original = weights(backbone.model)
    try:
        for i, request in enumerate(requests[:3]):
            method.rollout.step(EditBatch((request,), i))
        found = probe.measure(len(asked))
        now = [words(backbone, p) for p in near]
        assert probe.kl() > 0
    finally:
        method.rollout.reset()
    assert same(weights(backbone.model), original)
    assert 0 < found.ls.mean() < 1
    assert found.ls.tolist() == [float(a == b) for a, b in zip(before, now, strict=True)]
    part = probe.measure(20)
    assert part.ls.tolist() == [1.0] * 20 and part.es.shape == (20,)


def words(backbone, place: Locality) -> list[int]:
    """The greedy tokens of a generation loop, as many as the gold answer has."""
    tokenizer = backbone.tokenizer
    ids = tokenizer(place.prompt)["input_ids"]
    whole = f"{place.prompt} {place.answer}"
    count = len(tokenizer(whole)["input_ids"]) - len(ids) if place.answer else 3
    start = len(ids)
    for _ in range(count):
        ids.append(int(backbone.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return ids[start:]


def test_a_stream_without_paraphrases_and_locality_is_not_measured_there(backbone):
    probe = StreamProbe(backbone, [EditRequest("The capital of France is", "Paris")])
    scores = probe.before.scores()
    assert (scores.ES, scores.GS, scores.LS, scores.LS_gold) == (1.0, None, None, None)
    assert (scores.ES_prob, scores.LS_prob, scores.GS_pos, scores.LS_known) == (None,) * 4
