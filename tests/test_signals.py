"""Signals in padded batches against dense autograd, one sequence at a time."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from backbones import EDITS, SIDES, TOLERANCE, dense_gradients, plain_logits, random_shifts
from models import (
    ARCHITECTURES,
    VOCABULARY,
    Sample,
    pad_batch,
    random_sequences,
    tiny_model,
    tiny_tokenizer,
)
from torch.testing import assert_close

from hiedit.backbone.model import Backbone
from hiedit.backbone.signals import Probe, edit_tokens

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


def test_signals_equal_dense_autograd(backbone, side):
    """``sum_t g_t k_t^T`` of each edit in the batch is its dense gradient, computed alone."""
    sequences = random_sequences()
    signals = Probe(backbone, pad_batch(sequences, side), EDITS, "all").signals()
    expected = dense_gradients(backbone.model, backbone.names, sequences)
    assert list(signals.keys) == list(signals.grads) == backbone.names
    for name, module in backbone.modules.items():
        for edit in range(EDITS):
            of_edit = signals.edit == edit
            gradient = signals.grads[name][of_edit].T @ signals.keys[name][of_edit]
            gradient = gradient.T if module.conv1d else gradient
            assert_close(gradient, expected[edit][name], **TOLERANCE)
            assert gradient.abs().max() > 1e-4  # a comparison of zeros would show nothing


def test_signals_of_an_edit_do_not_depend_on_the_batch(backbone, side):
    sequences = random_sequences()
    together = Probe(backbone, pad_batch(sequences, side), EDITS, "all").signals()
    for edit in range(EDITS):
        own = [Sample(s.ids, s.answer) for s in sequences if s.edit == edit]
        alone = Probe(backbone, pad_batch(own, side), 1, "all").signals()
        of_edit = together.edit == edit
        assert_close(together.loss[edit], alone.loss[0], **TOLERANCE)
        assert_close(together.confidence[edit], alone.confidence[0], **TOLERANCE)
        for name in backbone.names:
            assert_close(together.keys[name][of_edit], alone.keys[name], **TOLERANCE)
            assert_close(together.grads[name][of_edit], alone.grads[name], **TOLERANCE)


def test_answer_signals_are_the_subset_at_the_answer(backbone, side):
    sequences = random_sequences()
    batch = pad_batch(sequences, side)
    everything = Probe(backbone, batch, EDITS, "all").signals()
    answer = Probe(backbone, batch, EDITS, "answer").signals()
    # "all" holds every token of a sequence but the last, "answer" those that predict.
    subset = torch.cat(
        [
            torch.tensor([p + 1 in s.answer for p in range(len(s.ids) - 1)], dtype=torch.bool)
            for s in sequences
        ]
    )
    assert_close(answer.edit, everything.edit[subset])
    for name in backbone.names:
        assert_close(answer.keys[name], everything.keys[name][subset], **TOLERANCE)
        assert_close(answer.grads[name], everything.grads[name][subset], **TOLERANCE)


def test_padding_never_appears(backbone, side):
    sequences = random_sequences()
    signals, poisoned = (
        Probe(backbone, pad_batch(sequences, side, fill), EDITS, "all").signals()
        for fill in (7, VOCABULARY - 1)
    )
    tokens = sum(len(s.ids) - 1 for s in sequences)
    assert signals.edit.tolist() == [s.edit for s in sequences for _ in s.ids[1:]]
    for name, module in backbone.modules.items():
        assert signals.keys[name].shape == (tokens, module.in_features)
        assert signals.grads[name].shape == (tokens, module.out_features)
        assert_close(signals.keys[name], poisoned.keys[name], **TOLERANCE)
        assert_close(signals.grads[name], poisoned.grads[name], **TOLERANCE)


def test_edit_tokens(side):
    sequences = random_sequences(((7, 2, 0), (5, 1, 1)), trailing=1)
    batch = pad_batch(sequences, side)
    for which, expected in (("answer", ([3, 4], [2])), ("all", (range(5), range(3)))):
        where = edit_tokens(batch, which)
        for row, (sequence, positions) in enumerate(zip(sequences, expected, strict=True)):
            start = batch.ids.shape[1] - len(sequence.ids) if side == "left" else 0
            assert where[row].nonzero().flatten().tolist() == [start + p for p in positions]
    with pytest.raises(ValueError, match="valid are answer, all"):
        edit_tokens(batch, "last")


def test_loss_and_confidence_by_hand(backbone, side):
    sequences = random_sequences()
    probe = Probe(backbone, pad_batch(sequences, side), EDITS, "all")
    loss, lowest, accuracy = torch.zeros(EDITS), torch.ones(EDITS), []
    for s in sequences:
        probability = plain_logits(backbone.model, s).softmax(-1)
        target = [s.ids[p] for p in s.answer]
        chosen = probability[range(len(target)), target]
        share = sum(other.edit == s.edit for other in sequences)
        loss[s.edit] += -chosen.log().mean() / share
        lowest[s.edit] = min(lowest[s.edit], chosen.min())
        accuracy.append((probability.argmax(-1) == torch.tensor(target)).float().mean())
    signals = probe.signals()
    for result in (probe, signals):
        assert_close(result.loss, loss, **TOLERANCE)
        assert_close(result.confidence, lowest, **TOLERANCE)
        assert not result.loss.requires_grad and not result.confidence.requires_grad


def test_an_edit_without_sequences_has_no_tokens(llama):
    probe = Probe(llama, pad_batch(random_sequences(((6, 2, 1),)), "left"), 3, "all")
    signals = probe.signals()
    assert signals.edit.tolist() == [1] * 5
    assert probe.loss[0] == probe.loss[2] == 0
    assert probe.confidence[0] == probe.confidence[2] == 1


def test_a_probe_needs_no_surrounding_gradient_mode(llama):
    batch = pad_batch(random_sequences(), "left")
    expected = Probe(llama, batch, EDITS).signals()
    with torch.no_grad():
        signals = Probe(llama, batch, EDITS).signals()
    for name in llama.names:
        assert torch.equal(signals.grads[name], expected.grads[name])
        assert not signals.grads[name].requires_grad and not signals.keys[name].requires_grad


def test_the_graph_begins_at_the_lowest_editable_module():
    backbone = Backbone(tiny_model("llama"), None, "*.{2,3}.mlp.up_proj")
    needed = {}
    with contextlib.ExitStack() as stack:
        for name, module in backbone.model.named_modules():
            if name.endswith(("input_layernorm", "up_proj", "down_proj")):
                handle = module.register_forward_hook(
                    lambda _, __, out, name=name: needed.__setitem__(name, out.requires_grad)
                )
                stack.callback(handle.remove)
        Probe(backbone, pad_batch(random_sequences(), "left"), EDITS).signals()
    grown = {name.split(".", 2)[2] for name, needs in needed.items() if needs}
    assert grown == {"2.mlp.down_proj", "3.input_layernorm", "3.mlp.up_proj", "3.mlp.down_proj"}


def test_signals_of_a_bfloat16_model_are_float32():
    plain = tiny_model("llama")
    half = Backbone(copy.deepcopy(plain).bfloat16(), None)
    shifts = random_shifts(half, "rows")
    batch = pad_batch(random_sequences(), "left")
    with half.shifted(shifts):
        signals = Probe(half, batch, EDITS).signals()
    exact = Backbone(plain, None)
    with exact.shifted(shifts):
        expected = Probe(exact, batch, EDITS).signals()
    assert_close(signals.loss, expected.loss, rtol=0.05, atol=0.05)
    for name in half.names:
        assert signals.keys[name].dtype == signals.grads[name].dtype == torch.float32
        pair = signals.grads[name].flatten(), expected.grads[name].flatten()
        assert F.cosine_similarity(*pair, dim=0) > 0.98
