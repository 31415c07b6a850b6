"""The published comparisons and the counts of locality, against what they are defined as."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from worlds import MODULES, quick

from hiedit.config import EvaluateConfig
from hiedit.data.schemas import get_schema
from hiedit.evaluation.lifelong import StreamProbe, run_stream
from hiedit.evaluation.report import example_lines, legend
from hiedit.evaluation.results import from_plain, plain
from hiedit.experiment import load_backbone
from hiedit.methods import build_method
from hiedit.runconfig import ModelConfig
from hiedit.types import EditRequest, Locality
from hiedit.world import world_requests

pytestmark = pytest.mark.usefixtures("one_thread")

ROW = {
    "requested_rewrite": {
        "prompt": "The capital of {} is",
        "subject": "France",
        "target_new": {"str": "Buenos Aires"},
        "target_true": {"str": "Paris"},
    },
    "paraphrase_prompts": ["France has the capital", "The capital city of France is"],
    "neighborhood_prompts": [f"Neighbour {i} of France is" for i in range(9)]
    + ["The capital of France is"],
}


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(ModelConfig(modules=MODULES, device="cpu"))


def logits(backbone, prompt: str, answer: str):
    """[n, V] at the answer's tokens, and the tokens."""
    tokenizer = backbone.tokenizer
    start = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(f"{prompt} {answer}")["input_ids"]
    with torch.no_grad():
        said = backbone.model(input_ids=torch.tensor([ids])).logits[0]
    return said[start - 1 : -1], ids[start:]


def nll(backbone, prompt: str, answer: str) -> float:
    said, ids = logits(backbone, prompt, answer)
    return -float(sum(row.log_softmax(-1)[i] for row, i in zip(said, ids, strict=True))) / len(ids)


def places(backbone, prompt: str, answer: str, other: str) -> float:
    """Share of the places of both answers where the answer's logit is above the other's."""
    said, ids = logits(backbone, prompt, answer)
    _, rival = logits(backbone, prompt, other)
    rows = list(zip(said, ids, rival, strict=False))
    return sum(bool(row[a] > row[b]) for row, a, b in rows) / len(rows)


def test_a_record_keeps_all_phrasings_and_neighbours():
    request = get_schema("counterfact-rome").convert(ROW)
    assert len(request.heldout) == 2 and len(request.locality) == 10
    assert {p.answer for p in request.locality} == {"Paris"} == {request.old_target}


def test_the_published_comparisons(backbone):
    request = get_schema("counterfact-rome").convert(ROW)
    scores = StreamProbe(backbone, [request]).before.scores()
    new, old = request.target, request.old_target
    assert len(logits(backbone, request.prompt, new)[1]) > 1  # cut to the shorter answer
    over = [nll(backbone, p, new) < nll(backbone, p, old) for p in request.heldout]
    under = [nll(backbone, p.prompt, old) < nll(backbone, p.prompt, new) for p in request.locality]
    assert (
        scores.ES_prob
        == 0.0
        == float(nll(backbone, request.prompt, new) < nll(backbone, request.prompt, old))
    )
    assert scores.GS_prob == pytest.approx(sum(over) / 2)
    assert scores.LS_prob == pytest.approx(sum(under) / 10) and 0 < scores.LS_prob
    assert scores.ES_pos == places(backbone, request.prompt, new, old)
    assert scores.GS_pos == places(backbone, request.heldout[0], new, old)
    assert scores.LS_pos == places(backbone, request.locality[0].prompt, old, new)


def test_what_is_missing_is_none(backbone):
    near = (Locality("The capital of Spain is", "Madrid"), Locality("Who is it?"))
    asked = EditRequest("The capital of France is", "Lyon", locality=near)
    found = StreamProbe(backbone, [asked]).before.scores()
    assert (found.ES_prob, found.ES_pos, found.LS_prob, found.LS_pos) == (None,) * 4
    assert found.LS == found.LS_gold == found.LS_known == 1.0
    known = EditRequest("The capital of France is", "Lyon", locality=near, old_target="Paris")
    found = StreamProbe(backbone, [known]).before.scores()
    assert found.ES_prob == 0.0 and found.LS_prob is None  # Madrid is not its old answer
    same = EditRequest("The capital of France is", "Paris", old_target="Paris")
    assert StreamProbe(backbone, [same]).before.scores().ES_prob is None


def test_gold_answers_count_where_they_were_given(backbone):
    """One of three gold answers was given; the share is over all prompts, not over requests."""
    near = [("Spain", "Madrid"), ("Italy", "Oslo"), ("Japan", "Lisbon")]
    near = tuple(Locality(f"The capital of {c} is", a) for c, a in near)
    more = (
        Locality("The capital of Peru is", "Lima"),
        Locality("The capital of Kenya is", "Nairobi"),
    )
    asked = [
        EditRequest("The capital of France is", "Lyon", locality=near),
        EditRequest("The capital of Germany is", "Bonn", locality=more),
    ]
    probe = StreamProbe(backbone, asked)
    assert probe.before.scores().LS_known == pytest.approx(3 / 5)
    assert (probe.before.known.tolist(), probe.before.asked.tolist()) == ([1, 2], [3, 2])
    head = backbone.model.get_output_embeddings().weight
    token = backbone.tokenizer(f"{more[0].prompt} {more[0].answer}")["input_ids"]
    token = token[len(backbone.tokenizer(more[0].prompt)["input_ids"])]
    before = head[token].clone()
    try:
        with torch.no_grad():
            head[token] = -before  # it cannot be said any more
        found = probe.measure(2).scores()
    finally:
        with torch.no_grad():
            head[token] = before
    assert found.LS_gold == pytest.approx(2 / 3) and found.LS_known == pytest.approx(3 / 5)
    assert found.LS == pytest.approx((1 + 1 / 2) / 2)


def test_a_run_measures_edits_at_once_and_reads_plain_text(backbone, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("The capital of France is Paris.\n")
    config = EvaluateConfig(points=1, batch=32, examples=2, immediate=True, neutral=str(texts))
    requests = world_requests("test")[:3]
    method = build_method(backbone, quick("ultraedit"))
    probe = StreamProbe(backbone, requests, 32)
    try:
        found = run_stream(method.rollout, probe, config, method="m")
    finally:
        method.rollout.reset()
    row = found.row()
    assert 0 <= row["immediate_ES"] <= 1 and row["immediate_GS_tf"] is not None
    assert row["immediate_LS"] is None and row["immediate_LS_gold"] is None
    assert math.isfinite(row["perplexity_before"]) and row["perplexity_after"] > 0
    assert row["perplexity_before"] != row["perplexity_after"]
    example = found.examples[0]
    assert example.before.startswith(requests[0].old_target)
    assert example.locality_kept in (True, False) and len(example_lines(found)) > 2
    calm = run_stream(method.rollout, probe, EvaluateConfig(points=1, batch=32), method="m")
    method.rollout.reset()
    assert calm.immediate is None and calm.perplexity_before > 1
    assert calm.superseded == 0 and calm.standing is None and calm.row()["standing_ES"] is None


def test_a_run_scores_the_edits_that_no_later_one_contradicts_by_themselves(backbone):
    """Two answers to one fact, asked in two ways: the first is not held against the editor. The
    second is the one that the model gives anyway."""
    first, *_ = world_requests("test")
    other = dataclasses.replace(
        first, prompt=first.heldout[0], target=first.old_target, heldout=(first.prompt,)
    )
    method = build_method(backbone, quick("ultraedit"))
    probe = StreamProbe(backbone, (first, other), 32)
    try:
        found = run_stream(method.rollout, probe, EvaluateConfig(points=1, batch=32), method="m")
        alone = probe.measure(2)
    finally:
        method.rollout.reset()
    assert found.superseded == 1 and alone.es.tolist() == [0, 1]
    for name in ("ES", "GS", "LS", "ES_tf"):
        values = getattr(alone, name.lower())
        assert getattr(found.standing, name) == values[1] == found.row()[f"standing_{name}"]
        assert getattr(found.scores, name) == values.mean()
    assert found.standing != found.scores
    assert from_plain(plain(found)) == found
    told = "\n".join(legend([found]))
    assert "gives 1 of them another answer" in told
    assert f"m: ES {100 * alone.es[1]:.1f}" in told
