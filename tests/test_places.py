"""Where edits are made: the subject's last token, behind contexts, in other phrasings."""

from __future__ import annotations

import copy

import pytest
import torch
from models import tiny_model, tiny_tokenizer
from test_tokens import BUILD, Letters, _hand_made, text_of
from tokenizers import decoders, processors

from hiedit.backbone.model import Backbone
from hiedit.backbone.signals import edit_tokens
from hiedit.config import MethodConfig, from_mapping
from hiedit.data.tokens import encode, encode_prompts
from hiedit.methods import build_method, editor_of, editor_tensors, load_editor, save_editor
from hiedit.rl.sequences import LONGEST, SHORTEST, EditSequences, draw_contexts
from hiedit.types import IGNORE, EditBatch, EditRequest

pytestmark = pytest.mark.usefixtures("one_thread")

# prompt, answer, what it is about
ABOUT = [
    ("The capital of France is", "Lyon", "France"),
    ("Danielle Darrieux was", "English", "Danielle Darrieux"),  # at the beginning, many tokens
    ("Who says uniform cloth in zürich", "London", "zürich"),  # at the end
    ("The city 🙂 is", "Paris", "🙂"),  # a letter of several tokens
    ("The year was", "2006", None),
]
PAIRS = [(prompt, answer) for prompt, answer, _ in ABOUT]
SPANS = [s and (p.index(s), p.index(s) + len(s)) for p, _, s in ABOUT]
OSLO = EditRequest(
    "Oslo lies in",
    "Peru",
    paraphrases=("Oslo is in", "Find Oslo in", "Oslo lies in"),
    heldout=("Find Oslo in",),
    subject="Oslo",
)
BONN = EditRequest("Where is Bonn? In", "Mali", paraphrases=("bonn is in",))
TEXTS = ("So be it.", "I am here.")
MODULES = ["model.layers.{0-1}.mlp.down_proj"]
PRESERVE = [("Rome lies in", "Italy"), ("Lima is in", "Peru"), ("Ink is", "blue")]


@pytest.fixture(scope="module")
def backbone():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()  # letters to words
    return Backbone(tiny_model("llama", num_hidden_layers=2), tokenizer, MODULES)


def config(**updater) -> MethodConfig:
    updater = {"tokens": "subject", "contexts": 2, **updater}
    passes = {"max": 1, "target_probability": 1.0, "undo": False}
    return from_mapping(MethodConfig, {"updater": updater, "passes": passes})


# ---- columns


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_column_is_the_subjects_last_token(name, side):
    tokenizer = BUILD[name]()
    batch = encode(tokenizer, PAIRS, padding_side=side, subjects=SPANS)
    assert batch.subject.dtype == torch.int64 and batch.subject[-1] == -1
    for row, (prompt, _, subject) in enumerate(ABOUT[:-1]):
        column = int(batch.subject[row])
        assert batch.attention[row, column] and (batch.labels[row, : column + 1] == IGNORE).all()
        ids = batch.ids[row].masked_fill(batch.attention[row] == 0, tokenizer.bos_token_id)
        if "<unk>" in text_of(tokenizer, ids):
            continue
        upto, before = (
            tokenizer.decode(
                ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            for end in (column + 1, column)
        )
        whole = prompt[: SPANS[row][1]].replace(" ", "")
        assert whole in upto.replace(" ", "") and whole not in before.replace(" ", ""), subject


def test_the_first_column_without_anything_in_front():
    bpe = BUILD["byte-level, trimmed offsets"]()
    batch = encode(
        bpe, [("a is", "b"), ("x", "bbbb is")], padding_side="left", subjects=[(0, 1)] * 2
    )
    starts = (batch.attention == 0).sum(1)
    assert torch.equal(batch.subject, starts) and starts.min() == 0


def test_a_token_that_holds_subject_and_answer_is_not_edited_at():
    """What predicts the answer's first token stands before it."""
    spanning = _hand_made(["a", "b", "c", "Ġ", "bĠ", "bĠc"], [("b", "Ġ"), ("bĠ", "c")])
    for side in ("left", "right"):
        batch = encode(spanning, [("ab", "ca"), ("aab", "ca")], padding_side=side,
                       subjects=[(0, 2), (0, 3)])  # fmt: skip
        for row, column in enumerate(batch.subject.tolist()):
            assert text_of(spanning, batch.ids[row, column + 1]) == "b c"
            assert batch.labels[row, column + 1] != IGNORE


def test_columns_of_a_slow_tokenizer():
    pairs, spans = [("abc A B", "de"), ("A", "b"), ("bb", "a")], [(4, 5), (0, 1), None]
    for side, wanted in (("right", [5, 1, -1]), ("left", [5, 8, -1])):
        batch = encode(Letters(), pairs, padding_side=side, subjects=spans)
        assert batch.subject.tolist() == wanted
        assert all(batch.ids[r, wanted[r]] == 30 for r in (0, 1))  # the letter A


def test_columns_are_there_only_if_asked_for():
    bpe = BUILD["byte-level, bos"]()
    assert encode(bpe, PAIRS).subject is None
    nobody = encode(bpe, PAIRS, subjects=[None] * len(PAIRS))
    assert nobody.subject.tolist() == [-1] * len(PAIRS)
    with pytest.raises(ValueError, match="subjects has 1 entries for 5 pairs"):
        encode(bpe, PAIRS, subjects=[None])
    some = encode(bpe, PAIRS, subjects=SPANS, padding_side="left")
    rows = torch.tensor([3, 0])
    assert torch.equal(some.select(rows).subject, some.subject[rows])
    assert torch.equal(some.to("cpu").subject, some.subject)
    assert encode(bpe, [], subjects=[]).subject.shape == (0,)


def test_edit_tokens_at_the_subject_or_else_at_the_answer():
    bpe = BUILD["byte-level, bos"]()
    batch = encode(bpe, PAIRS, subjects=SPANS, padding_side="left")
    where, answer = edit_tokens(batch, "subject"), edit_tokens(batch, "answer")
    assert where[:-1].sum(1).tolist() == [1] * 4
    assert where[:-1].long().argmax(1).tolist() == batch.subject[:-1].tolist()
    assert torch.equal(where[-1], answer[-1]) and answer[-1].any()
    assert torch.equal(
        edit_tokens(encode(bpe, PAIRS), "subject"), edit_tokens(encode(bpe, PAIRS), "answer")
    )
    with pytest.raises(ValueError, match="valid are answer, all, subject"):
        edit_tokens(batch, "title")


# ---- sequences


def test_what_an_edit_is_made_on(backbone):
    sequences = EditSequences(backbone.tokenizer, TEXTS)
    behind = [f"{text} Oslo lies in" for text in TEXTS]
    assert sequences.prompts(OSLO) == ["Oslo lies in", *behind, "Oslo is in"]
    alone = EditSequences(backbone.tokenizer, TEXTS, phrasings=False)
    assert alone.prompts(OSLO) == ["Oslo lies in", *behind]
    assert EditSequences(backbone.tokenizer).prompts(BONN) == [BONN.prompt, "bonn is in"]


def test_whose_sequences_they_are(backbone):
    sequences = EditSequences(backbone.tokenizer, TEXTS, subject=True)
    asked = [("Lima is in", "Peru"), ("ink is", "blue")]
    batch = sequences.encode(EditBatch((OSLO, BONN)), asked)
    assert batch.edit.tolist() == [0] * 4 + [1] * 4 + [2, 3]
    said = [
        backbone.tokenizer.decode(ids[:column], skip_special_tokens=True)
        for ids, column in zip(batch.ids, (batch.subject + 1).tolist(), strict=True)
    ]
    # The request names Oslo; Bonn is found where it looks like a name, then anywhere; Lima too.
    assert said[:6] == ["Oslo", "So be it. Oslo", "I am here. Oslo", "Oslo",
                        "Where is Bonn", "So be it. Where is Bonn"]  # fmt: skip
    assert said[6:] == ["I am here. Where is Bonn", "bonn", "Lima", ""] and batch.subject[9] == -1
    plain = EditSequences(backbone.tokenizer, TEXTS).encode(EditBatch((OSLO, BONN)), asked)
    assert plain.subject is None and torch.equal(plain.ids, batch.ids)


def rows_of(rollout, monkeypatch, *args) -> list[str]:
    """The sequences of one edit, without their padding."""
    seen, probe = [], rollout.env.probe

    def spy(batch, *more):
        seen.append(batch)
        return probe(batch, *more)

    monkeypatch.setattr(rollout.env, "probe", spy)
    rollout.propose(*args)
    rollout.env.drop()
    tokenizer = rollout.env.backbone.tokenizer
    return [tokenizer.decode(ids, skip_special_tokens=True).lstrip() for ids in seen[0].ids]


def test_phrasings_are_edited_but_never_in_training(backbone, monkeypatch):
    rollout = build_method(backbone, config(), preserve=PRESERVE).rollout
    rollout.contexts = TEXTS
    prompts = EditSequences(backbone.tokenizer, TEXTS).prompts(OSLO)
    edited = rows_of(rollout, monkeypatch, EditBatch((OSLO,)))
    assert edited == [f"{prompt} Peru" for prompt in prompts] and len(prompts) == 4

    def on_pass(signals, action):
        with torch.no_grad():
            return rollout.updater(signals, action.mask)

    trained = rows_of(rollout, monkeypatch, EditBatch((OSLO,)), on_pass)
    assert trained == edited[:3]


# ---- contexts


def test_contexts_are_the_same_for_a_seed(backbone, monkeypatch):
    passes = []
    follow = backbone.next_logits
    monkeypatch.setattr(backbone, "next_logits", lambda *x: passes.append(len(x[0])) or follow(*x))
    texts = draw_contexts(backbone, 7, seed=3)
    assert SHORTEST <= len(passes) <= LONGEST and set(passes) == {7}  # side by side
    assert texts == draw_contexts(backbone, 7, seed=3) != draw_contexts(backbone, 7, seed=4)
    assert all(text.endswith(".") and not text.endswith("..") for text in texts)
    begins = ("The", "Therefore", "Because", "I", "You", "The", "Therefore")
    for text, begin in zip(texts, begins, strict=True):
        assert text.startswith(begin) and len(text) <= len(begin) + LONGEST + 1
    assert len(set(texts)) == 7 and draw_contexts(backbone, 0) == ()


def test_no_special_token_is_drawn(backbone, monkeypatch):
    """A text that was ended in its middle would go on with anything."""
    tokenizer = backbone.tokenizer

    def eager(ids, attention):
        assert not (ids[attention.bool()] == tokenizer.eos_token_id).any()
        logits = torch.zeros(len(ids), len(tokenizer))
        logits[:, tokenizer.all_special_ids] = 50.0
        logits[:, tokenizer.convert_tokens_to_ids("k")] = 40.0
        return logits

    monkeypatch.setattr(backbone, "next_logits", eager)
    for text, begin in zip(draw_contexts(backbone, 2), ("The", "Therefore"), strict=True):
        drawn = text.removeprefix(begin).removesuffix(".")
        assert set(drawn) == {"k"} and SHORTEST <= len(drawn) <= LONGEST


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_what_follows_does_not_depend_on_the_padding(architecture):
    backbone = Backbone(tiny_model(architecture), tiny_tokenizer())
    prompts = ["The", "Therefore", "I"]
    together = backbone.next_logits(*encode_prompts(backbone.tokenizer, prompts))
    for prompt, found in zip(prompts, together, strict=True):
        ids = torch.tensor([backbone.tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            alone = backbone.model(input_ids=ids, use_cache=False).logits[0, -1]
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_contexts_stay_with_a_trained_editor(backbone, tmp_path):
    made = build_method(backbone, config(), preserve=PRESERVE)
    texts = made.rollout.contexts
    assert len(texts) == 2 and texts == draw_contexts(backbone, 2, seed=0)
    save_editor(made, tmp_path)
    assert load_editor(backbone, tmp_path, seed=5).rollout.contexts == texts
    tensors = editor_tensors(made)
    assert editor_of(backbone, made.config, tensors, seed=5).rollout.contexts == texts
    bare = {name: tensor for name, tensor in tensors.items() if not name.startswith("contexts")}
    assert editor_of(backbone, made.config, bare).rollout.contexts == ()
    broken = tensors | {"contexts.texts": torch.tensor([255, 0], dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match="contexts"):
        editor_of(backbone, made.config, broken)


def test_contexts_travel_to_workers(backbone):
    from hiedit.distributed.learner import contexts_in
    from hiedit.distributed.transport import pack

    made = build_method(backbone, config(), preserve=PRESERVE)
    assert contexts_in(pack(editor_tensors(made))) == made.rollout.contexts != ()
    made.rollout.contexts = ()
    assert contexts_in(pack(editor_tensors(made))) == ()


def test_a_subject_that_is_the_first_token_is_not_edited(backbone):
    """The first token is a sink in most models; here nothing is put in front of it."""
    bare = copy.copy(backbone.tokenizer)
    bare._tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    sequences = EditSequences(bare, ("I am.",), subject=True)
    batch = sequences.encode(EditBatch((EditRequest("X is", "ab", subject="X"),)))
    assert batch.subject.tolist()[0] == -1 and batch.subject.tolist()[1] > 0
    where = edit_tokens(batch, "subject")
    assert torch.equal(where[0], edit_tokens(batch, "answer")[0]) and where[1].sum() == 1
