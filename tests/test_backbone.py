"""Answers against the plain model; the model stays the caller's own object; moments of its keys."""

import pytest
import torch
from backbones import EDITS, SIDES, TOLERANCE, hooks, plain_logits, random_shifts
from models import ARCHITECTURES, Sample, pad_batch, random_sequences, tiny_model, tiny_tokenizer
from torch.testing import assert_close

from hiedit.backbone.model import Backbone
from hiedit.backbone.moments import SINK, key_moments, phrasing_scatter
from hiedit.backbone.signals import Probe
from hiedit.data.tokens import encode
from hiedit.types import Shift

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def model(architecture):
    return tiny_model(architecture)


@pytest.fixture(scope="module")
def backbone(model):
    """Every linear layer editable: attention, both halves of the MLP, all layers."""
    return Backbone(model, None, "*")


@pytest.fixture(scope="module")
def llama():
    return Backbone(tiny_model("llama"), tiny_tokenizer())


@pytest.fixture(params=SIDES)
def side(request):
    return request.param


# ---- answers


def test_answers_equal_the_plain_models_logits(backbone, side):
    sequences = random_sequences()
    answers = backbone.answers(pad_batch(sequences, side))
    expected = torch.cat([plain_logits(backbone.model, s) for s in sequences])
    assert_close(answers.logits, expected, **TOLERANCE)
    assert answers.target.tolist() == [s.ids[p] for s in sequences for p in s.answer]
    assert answers.row.tolist() == [i for i, s in enumerate(sequences) for _ in s.answer]
    assert answers.rows == len(sequences)


def test_answers_do_not_depend_on_the_batch(backbone, side):
    sequences = random_sequences()
    answers = backbone.answers(pad_batch(sequences, side))
    for row, sequence in enumerate(sequences):
        alone = backbone.answers(pad_batch([sequence], side)).logits
        assert_close(answers.take(row, row + 1).logits, alone, **TOLERANCE)


def test_answers_under_eager_attention(architecture, side):
    """The other fixtures run what transformers chooses: sdpa, where an architecture has it."""
    model = tiny_model(architecture, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    sequences = random_sequences()
    answers = Backbone(model, None).answers(pad_batch(sequences, side))
    expected = torch.cat([plain_logits(model, s) for s in sequences])
    assert_close(answers.logits, expected, **TOLERANCE)


def test_answers_in_the_middle_and_in_pieces(backbone, side):
    """Tokens may follow the answer, and a label may stand apart from the others."""
    sequences = random_sequences(((10, 2, 0), (6, 1, 1)), trailing=2)
    sequences.append(Sample((5, 9, 11, 13, 17, 19), (2, 4)))
    answers = backbone.answers(pad_batch(sequences, side))
    expected = torch.cat([plain_logits(backbone.model, s) for s in sequences])
    assert_close(answers.logits, expected, **TOLERANCE)


def test_only_what_predicts_an_answer_reaches_the_output_embedding(llama):
    seen, sequences = [], random_sequences()
    head = llama.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    try:
        llama.answers(pad_batch(sequences, "left"))
        llama.answers(pad_batch(sequences[:1], "left"))
    finally:
        handle.remove()
    assert seen == [sum(len(s.answer) for s in sequences), len(sequences[0].answer)]


def test_answers_want_labels_that_something_predicts(llama):
    batch = pad_batch([Sample((5, 6, 7), range(0, 1))], "right")
    with pytest.raises(ValueError, match="position 0"):
        llama.answers(batch)
    with pytest.raises(ValueError, match="needs answer tokens"):
        llama.answers(pad_batch([Sample((5, 6, 7), range(0))], "right"))


def test_encoded_text_gives_the_same_answers_padded_on_either_side(llama):
    pairs = [("The capital of France is", "Paris"), ("2 + 2 =", "4"), ("A", "long answer")]
    left, right = (
        llama.answers(encode(llama.tokenizer, pairs, padding_side=s)) for s in ("left", "right")
    )
    assert_close(left.logits, right.logits, **TOLERANCE)
    text = llama.tokenizer.decode(left.take(0, 1).target)
    assert text.replace(" ", "") == "Paris"


# ---- the model stays the plain transformers object


def test_nothing_stays_behind(backbone):
    model, batch = backbone.model, pad_batch(random_sequences(), "left")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    forward = type(model).forward
    assert hooks(model) == 0
    with backbone.shifted(random_shifts(backbone)):
        assert hooks(model) == len(backbone.modules)
        Probe(backbone, batch, EDITS).signals()
        assert hooks(model) == len(backbone.modules)
    assert hooks(model) == 0
    assert type(model).forward is forward and "forward" not in vars(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_hooks_are_gone_after_an_exception(llama):
    with pytest.raises(RuntimeError, match="inside"):
        with llama.capture(), llama.shifted(random_shifts(llama)):
            assert hooks(llama.model) == 2 * len(llama.modules)
            raise RuntimeError("inside")
    assert hooks(llama.model) == 0
    wrong = {llama.names[0]: [Shift(torch.zeros(1, 5), torch.zeros(80, 1))]}
    with pytest.raises(RuntimeError):
        with llama.shifted(wrong):
            llama.answers(pad_batch(random_sequences(), "left"))
    assert hooks(llama.model) == 0


def test_the_model_is_the_callers_own_object():
    model = tiny_model("gpt2").train()
    backbone = Backbone(model, None)
    assert backbone.model is model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert backbone.device == torch.device("cpu")


def test_capture_gives_inputs_and_outputs(backbone):
    sequence = random_sequences()[:1]
    with backbone.capture() as (inputs, outputs):
        backbone.answers(pad_batch(sequence, "left"))
    assert set(inputs) == set(outputs) == set(backbone.names)
    for name, module in backbone.modules.items():
        flat = name.endswith((".fc1", ".fc2")) and "decoder" in name  # OPT's MLP
        assert inputs[name].shape == ((9,) if flat else (1, 9)) + (module.in_features,)
        assert outputs[name].shape == ((9,) if flat else (1, 9)) + (module.out_features,)
        assert not inputs[name].requires_grad and outputs[name].requires_grad
        assert_close(module.module(inputs[name]), outputs[name].detach(), **TOLERANCE)


# ---- second moments of keys


def test_key_moments(backbone, side):
    sequences = random_sequences()
    batches = [pad_batch(sequences[:3], side), pad_batch(sequences[3:], side)]
    moments = key_moments(backbone, batches)
    tokens = sum(len(s.ids) for s in sequences)
    inputs, outputs = {}, {}

    def hook(name):
        def record(_, args, out):
            inputs.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))
            outputs.setdefault(name, []).append(out.reshape(-1, out.shape[-1]))

        return record

    handles = [m.module.register_forward_hook(hook(n)) for n, m in backbone.modules.items()]
    for s in sequences:
        plain_logits(backbone.model, s)
    for handle in handles:
        handle.remove()
    for name in backbone.names:
        keys, values = torch.cat(inputs[name]), torch.cat(outputs[name])
        assert keys.shape[0] == tokens
        found, size = moments[name], keys.square().sum(-1)
        of_first = torch.cat(inputs[name][:3]).square().sum(-1)
        ordinary = size <= SINK**2 * of_first.median()
        assert ordinary.float().mean() > 0.8
        keys, values = keys[ordinary], values[ordinary]
        assert_close(found.moment, keys.T @ keys / len(keys), **TOLERANCE)
        assert_close(found.power, values.square().sum(-1).mean(), **TOLERANCE)
        assert (found.sinks is None) == bool(ordinary.all())
        assert not found.moment.requires_grad and not found.power.requires_grad


def test_phrasing_scatter(backbone, side):
    """Against the definition, one phrasing at a time; what cannot be compared does not count."""

    def fact(prompt):
        return Sample((*prompt, 7, 3), range(len(prompt), len(prompt) + 2))

    facts = [
        [
            fact((5,)),
            fact(
                (
                    4,
                    9,
                )
            ),
            fact(
                (
                    11,
                    12,
                    13,
                )
            ),
        ],
        [
            fact(
                (
                    20,
                    21,
                )
            ),
            fact((6,)),
        ],
        [fact((8,))],
        [fact((8,)), Sample((9, 7), range(1, 2))],
    ]
    found = phrasing_scatter(backbone, [pad_batch(some, side) for some in facts])
    wanted = dict.fromkeys(backbone.names, 0.0)
    for phrasings in facts[:2]:
        keys = {n: [] for n in wanted}
        for s in phrasings:
            with backbone.capture() as (inputs, _):
                backbone.answers(pad_batch([s], "left"))
            for n, x in inputs.items():  # the two places that predict an answer token
                keys[n].append(x.reshape(-1, x.shape[-1])[s.answer.start - 1 : s.answer.stop - 1])
        for n in wanted:
            k = torch.stack(keys[n])
            around = (k - k.mean(0)).flatten(0, 1)
            wanted[n] = wanted[n] + around.T @ around
    for n in wanted:
        assert_close(found[n], wanted[n] / (2 * 2 + 1 * 2), **TOLERANCE)
    with pytest.raises(ValueError, match="no fact was given in two phrasings"):
        phrasing_scatter(backbone, [pad_batch(facts[2], side)])


def test_key_moments_of_nothing_is_an_error(llama):
    with pytest.raises(ValueError, match="no prompts to preserve"):
        key_moments(llama, [])
