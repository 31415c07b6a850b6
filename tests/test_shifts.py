"""Functional shifts against the dense matrix in the weight: values, masks, gradients."""

import pytest
import torch
from backbones import (
    EDITS,
    SIDES,
    TOLERANCE,
    add_dense,
    dense_gradients,
    hooks,
    plain_logits,
    plain_nll,
    random_shifts,
)
from models import (
    ARCHITECTURES,
    VOCABULARY,
    pad_batch,
    random_sequences,
    tiny_model,
    tiny_tokenizer,
)
from torch import nn
from torch.testing import assert_close

from hiedit.backbone.losses import answer_nll
from hiedit.backbone.model import Backbone
from hiedit.backbone.signals import Probe
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


@pytest.mark.parametrize("scale", ["none", "rows"])
def test_a_shift_equals_the_dense_matrix_in_the_weight(backbone, side, scale):
    sequences = random_sequences()
    batch = pad_batch(sequences, side)
    shifts = random_shifts(backbone, scale)
    dense = add_dense(backbone, shifts)
    with backbone.shifted(shifts):
        shifted = backbone.answers(batch).logits
    expected = torch.cat([plain_logits(dense, s) for s in sequences])
    assert_close(shifted, expected, **TOLERANCE)
    assert (shifted - backbone.answers(batch).logits).abs().max() > 0.1  # it does something


def test_masks_per_sequence_equal_as_many_models(backbone, side):
    sequences = random_sequences()
    shifts = random_shifts(backbone, "sequences", rows=len(sequences))
    with backbone.shifted(shifts):
        answers = backbone.answers(pad_batch(sequences, side))
    for row, sequence in enumerate(sequences):
        dense = add_dense(backbone, shifts, row)
        assert_close(answers.take(row, row + 1).logits, plain_logits(dense, sequence), **TOLERANCE)


def test_stacks_add_up(backbone, side):
    sequences = random_sequences()
    batch = pad_batch(sequences, side)
    first, second = random_shifts(backbone, "rows"), random_shifts(backbone, "none", 2, seed=1)
    third = random_shifts(backbone, "sequences", 1, rows=len(sequences), seed=2)
    stacks = {name: first[name] + second[name] + third[name] for name in first}
    with backbone.shifted(stacks):
        stacked = backbone.answers(batch)
    with backbone.shifted(first), backbone.shifted(second), backbone.shifted(third):
        nested = backbone.answers(batch)
    for row, sequence in enumerate(sequences):
        expected = plain_logits(add_dense(backbone, stacks, row), sequence)
        assert_close(stacked.take(row, row + 1).logits, expected, **TOLERANCE)
        assert_close(nested.take(row, row + 1).logits, expected, **TOLERANCE)


def test_signals_of_a_shifted_model(backbone, side):
    """A pass on trial is part of the model that the next pass is captured from."""
    sequences = random_sequences()
    shifts = random_shifts(backbone, "rows")
    with backbone.shifted(shifts):
        probe = Probe(backbone, pad_batch(sequences, side), EDITS, "all")
    signals = probe.signals()  # the context is closed by then, as in the environment
    dense = add_dense(backbone, shifts)
    expected = dense_gradients(dense, backbone.names, sequences)
    for name, module in backbone.modules.items():
        for edit in range(EDITS):
            of_edit = signals.edit == edit
            gradient = signals.grads[name][of_edit].T @ signals.keys[name][of_edit]
            gradient = gradient.T if module.conv1d else gradient
            assert_close(gradient, expected[edit][name], **TOLERANCE)
    losses = [plain_nll(dense, s) for s in sequences]
    assert_close(probe.loss, torch.stack([sum(losses[:2]) / 2, *losses[2:]]), **TOLERANCE)


def test_a_single_shift_needs_no_list(llama):
    name, batch = llama.names[0], pad_batch(random_sequences(), "left")
    shift = random_shifts(llama)[name][0]
    with llama.shifted({name: shift}):
        one = llama.answers(batch).logits
    with llama.shifted({name: [shift]}):
        assert torch.equal(one, llama.answers(batch).logits)


def test_no_shift_changes_nothing(llama):
    batch = pad_batch(random_sequences(), "left")
    with llama.shifted({}), llama.shifted({llama.names[0]: []}):
        assert hooks(llama.model) == 0
        shifted = llama.answers(batch).logits
    assert torch.equal(shifted, llama.answers(batch).logits)


def test_shifting_a_module_that_is_not_editable_is_an_error(llama):
    shifts = random_shifts(llama)
    shifts["model.layers.0.mlp.down_proj"] = [Shift(torch.zeros(1, 80), torch.zeros(32, 1))]
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj.*not one of"):
        with llama.shifted(shifts):
            pass
    assert hooks(llama.model) == 0


class Norm(nn.RMSNorm):
    """Llama's norm without its detour through float32, which finite differences would see."""

    def __init__(self, norm):
        super().__init__(norm.weight.shape[0], norm.variance_epsilon, dtype=torch.float64)
        self.weight.data.copy_(norm.weight)


def double_model(architecture: str) -> nn.Module:
    if architecture == "gpt2":
        return tiny_model("gpt2", n_embd=8, n_inner=12, n_layer=2, n_head=2).double()
    model = tiny_model(
        "llama",
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
    ).double()
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            model.set_submodule(name, Norm(module))
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("scale", ["rows", "sequences"])
def test_gradients_of_a_shift_by_finite_differences(architecture, scale):
    backbone = Backbone(double_model(architecture), None, "*.0.mlp.*")
    sequences = random_sequences(((5, 2, 0), (4, 1, 1)))
    batch = pad_batch(sequences, "left")
    name = backbone.names[0]
    module = backbone.modules[name]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    a, b = draw(2, module.in_features), draw(module.out_features, 2)
    mask = draw(2) if scale == "rows" else draw(2, 2)
    weights = draw(3, VOCABULARY).detach()

    def score(a, b, mask):
        with backbone.shifted({name: [Shift(a, b, mask)]}):
            return (backbone.answers(batch).logits.log_softmax(-1) * weights).sum()

    assert torch.autograd.gradcheck(score, (a, b, mask))


def test_gradients_of_factors_are_those_of_the_dense_matrix(backbone, side):
    """dL/dA = (B diag(s))^T dL/dW and so on, dL/dW from dense autograd at the shifted weights."""
    sequences = random_sequences()
    shifts = random_shifts(backbone, "rows")
    leaves = [t for stack in shifts.values() for s in stack for t in (s.A, s.B, s.scale)]
    for leaf in leaves:
        leaf.requires_grad_()
    with backbone.shifted(shifts):
        nll = answer_nll(backbone.answers(pad_batch(sequences, side)))
    grads = torch.autograd.grad(nll[2:].sum() + nll[:2].mean(), leaves)  # summed over edits
    frozen = {name: [s.detach() for s in stack] for name, stack in shifts.items()}
    by_edit = dense_gradients(add_dense(backbone, frozen), backbone.names, sequences)
    for index, (name, (shift,)) in enumerate(frozen.items()):
        dense = sum(gradients[name] for gradients in by_edit)
        dense = dense.T if backbone.modules[name].conv1d else dense
        by_a, by_b, by_scale = grads[3 * index : 3 * index + 3]
        assert_close(by_a, (shift.B * shift.scale).T @ dense, **TOLERANCE)
        assert_close(by_b, dense @ (shift.scale[:, None] * shift.A).T, **TOLERANCE)
        assert_close(by_scale, (shift.B.T @ dense @ shift.A.T).diagonal(), **TOLERANCE)
