"""Perplexity of plain text, and where the text comes from."""

from __future__ import annotations

import math

import pytest
import torch
from models import tiny_model, tiny_tokenizer
from worlds import MODULES

from hiedit.backbone.model import Backbone
from hiedit.data.passages import PASSAGES, neutral_texts
from hiedit.evaluation.perplexity import WINDOW, perplexity
from hiedit.experiment import load_backbone
from hiedit.runconfig import ModelConfig

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_is_the_exponential_of_the_mean_loss_of_a_token():
    backbone = Backbone(tiny_model("gpt2"), tiny_tokenizer())
    texts = ["hello world", "a", "something that is longer than the others"]
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([backbone.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logp = backbone.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total -= float(logp.gather(-1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    assert perplexity(backbone, texts) == pytest.approx(math.exp(total / count), rel=1e-4)
    first = backbone.tokenizer(texts[0])["input_ids"]
    assert perplexity(backbone, texts, len(first)) == pytest.approx(
        perplexity(backbone, texts[:1]), rel=1e-4
    )
    assert perplexity(backbone, []) is None


def test_long_texts_are_read_in_windows_that_the_model_takes():
    backbone = Backbone(tiny_model("llama"), tiny_tokenizer())  # 96 positions
    assert math.isfinite(perplexity(backbone, ["abc " * 200]))
    assert WINDOW > 96


def test_the_world_reads_what_comes_with_the_package():
    backbone = load_backbone(ModelConfig(modules=MODULES, device="cpu"))
    before = perplexity(backbone, PASSAGES)
    assert 1 < before < math.inf and perplexity(backbone, PASSAGES) == before
    with torch.no_grad():
        for module in backbone.modules.values():
            module.weight.mul_(3.0)
    assert math.isfinite(after := perplexity(backbone, PASSAGES)) and after != before


def test_texts_of_the_user(tmp_path):
    assert neutral_texts() == PASSAGES and sum(len(p.split()) for p in PASSAGES) > 700
    plain = tmp_path / "plain.txt"
    plain.write_text("One text here.\n\nAnother one.\n")
    assert neutral_texts(plain) == ("One text here.", "Another one.")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"sentence": "It is a film.", "label": 1, "kind": "not this"}\n"so is this"\n')
    assert neutral_texts(rows) == ("It is a film.", "so is this")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("none.jsonl", None, "cannot be read: No such file"),
        ("bad.jsonl", b"{", "line 1 is not JSON"),
        ("empty.jsonl", b'{"label": "two words"}', "has no text"),
        ("empty.txt", b"\n", "has no text"),
        ("binary.txt", b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, content, problem):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"evaluate\.neutral=.*{name}.*{problem}"):
        neutral_texts(tmp_path / name)
