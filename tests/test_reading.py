"""What is read along paths that share their beginnings, against one forward pass for each."""

from __future__ import annotations

import pytest
import torch
from models import tiny_model, tiny_tokenizer
from transformers import GenerationConfig

from hiedit.backbone.model import Backbone
from hiedit.evaluation.metrics import continuations, generate
from hiedit.evaluation.reading import Path, paths, read

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(architecture: str = "llama") -> Backbone:
    return Backbone(tiny_model(architecture), tiny_tokenizer())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma2"])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_shared_beginnings_read_as_alone(architecture, batch):
    backbone = tiny(architecture)
    pairs = [("ab", "cd"), ("ab", "ce"), ("ab", "c"), ("ab c", "d"), ("xyz", "12345")]
    asked = [p for after in (False, True) for p in paths(backbone.tokenizer, pairs, after)]
    asked += [Path(p.ids, p.start, p.after, rival=asked[1].answer) for p in asked[:3]]
    found = read(backbone, asked, batch)
    for path, reading in zip(asked, found, strict=True):
        with torch.no_grad():
            logits = backbone.model(input_ids=torch.tensor([path.ids])).logits[0]
        logits = logits[path.start - 1 :]
        best = logits.argmax(-1).tolist()
        assert list(reading.best) == (best if path.after else best[:-1])
        own = torch.tensor(path.answer)
        logp = logits[:-1].log_softmax(-1).gather(-1, own[:, None]).squeeze(-1)
        assert reading.logp == pytest.approx(logp.tolist(), abs=1e-4)
        assert reading.mean_logp == pytest.approx(float(logp.mean()), abs=1e-4)
        rows = zip(logits, path.answer, path.rival, strict=False)
        assert list(reading.beats) == [bool(row[a] > row[b]) for row, a, b in rows]


def test_no_more_sequences_than_needed(monkeypatch):
    backbone, rows = tiny(), []
    answers = backbone.answers
    monkeypatch.setattr(backbone, "answers", lambda b: rows.append(len(b)) or answers(b))
    pairs = [("ab", "c"), ("ab", "d"), ("ab", "ef")]  # two first tokens stand after one prompt
    read(backbone, paths(backbone.tokenizer, pairs))
    assert rows == [1]
    read(backbone, paths(backbone.tokenizer, pairs, after=True))
    assert rows == [1, 3]


def test_kl_is_from_what_was_kept():
    backbone = tiny()
    (path,) = paths(backbone.tokenizer, [("ab", "cd")])
    (kept,) = read(backbone, [Path(path.ids, path.start, keep=True)])
    assert kept.kept.shape == (len(path.answer), 97)
    again = Path(path.ids, path.start, reference=kept.kept)
    assert abs(read(backbone, [again])[0].kl) < 1e-3
    module = next(iter(backbone.modules.values()))
    with torch.no_grad():
        module.weight.add_(torch.randn_like(module.weight))
    (moved,) = read(backbone, [Path(path.ids, path.start, reference=kept.kept, keep=True)])
    p, q = kept.kept.float(), moved.kept.float()
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert expected > 0.01 and moved.kl == pytest.approx(expected, abs=5e-3)


ODD = {
    "repetition_penalty": 5.0, "do_sample": True, "temperature": 9.0, "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(3, 60)), "min_new_tokens": 9, "num_beams": 2,
    "forced_eos_token_id": 2, "max_length": 4,
}  # fmt: skip


def test_generation_is_plain_greedy_whatever_the_model_asks_for():
    backbone = tiny()
    prompts = ["hello wor", "aaaaaaaa", "x"]
    plain = generate(backbone, prompts)
    assert len(set(plain)) > 1
    odd = GenerationConfig(**ODD, eos_token_id=2, pad_token_id=0)
    backbone.model.generation_config = odd
    assert generate(backbone, prompts) == plain
    assert backbone.model.generation_config is odd
    text = []
    for prompt in prompts:
        ids = backbone.tokenizer(prompt)["input_ids"]
        start = len(ids)
        while len(ids) < start + 12 and ids[-1] != 2:
            ids.append(int(backbone.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        said = backbone.tokenizer.decode(ids[start:], skip_special_tokens=True)
        text.append(said.strip().split("\n")[0].strip())
    assert plain == text


def test_continuations_by_passes_and_by_generation_agree():
    backbone = tiny()
    prompts = ["hello wor", "aaaaaaaa", "x"]
    long = continuations(backbone, prompts, [7, 7, 7])
    short = continuations(backbone, prompts, [3, 1, 2])
    for one, other, count in zip(long, short, [3, 1, 2], strict=True):
        assert one.answer[:count] == other.answer and one.start == other.start
    ends = tiny()
    ends.model.generation_config.eos_token_id = [2, short[0].answer[1]]
    (path,) = continuations(ends, prompts[:1], [3])
    assert path.answer == short[0].answer[:2]  # the token that ends the text belongs to it
