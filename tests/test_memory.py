"""No dense weight gradient and no dense shift is ever allocated during training.

A dispatch mode sees every tensor that any operator returns, in the forward pass, in the backward
pass and in the commit. It notes the floating ones that live in fresh memory and are as large as a
weight of the model, a stack of them included. Hidden and intermediate size are primes, so nothing
else has such a shape.
"""

import pytest
import torch
from models import VOCABULARY, tiny_model, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hiedit.backbone.model
import hiedit.ledger.accumulate
import hiedit.ledger.state
from hiedit import extension
from hiedit.backbone.model import Backbone
from hiedit.config import MethodConfig, TrainConfig, from_mapping
from hiedit.methods import build_method
from hiedit.types import EditBatch, EditRequest, Locality, Shift

pytestmark = pytest.mark.usefixtures("one_thread")

HIDDEN, MLP, HEAD = 37, 83, 62
# Elements of the model's matrices; Q, K, V and O are [62, 37] and [37, 62].
SIZES = (MLP * HIDDEN, HEAD * HIDDEN, VOCABULARY * HIDDEN)
SOLVERS = ("outer", "least_squares", "protected")
BACKENDS = ("cpp", "reference")


class DenseWatcher(TorchDispatchMode):
    """Collects in ``found`` every allocation of a floating tensor as large as a weight, or as
    several of one; ``ops`` counts what it looked at, ``paused`` switches it off."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.ops, self.backward_ops, self.paused = 0, 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.paused:
            return out
        self.ops += 1
        self.backward_ops += "backward" in str(func)
        known = {memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            fresh = isinstance(t, torch.Tensor) and t.numel() and memory(t) not in known
            if fresh and t.is_floating_point() and any(t.numel() % size == 0 for size in SIZES):
                self.found.append(f"{func} -> {list(t.shape)} {t.dtype}")
        return out


def memory(t: torch.Tensor) -> int:
    return t.untyped_storage().data_ptr()


def requests() -> list[EditRequest]:
    """Edits that share no prompt."""
    places = ("Rome", "Oslo", "Lima", "Bonn")
    return [
        EditRequest(
            f"{place} is in",
            target,
            paraphrases=(f"Where is {place}? In", f"Find {place} in"),
            locality=(Locality(f"{place} has a", "name"), Locality(f"No {place}", "way")),
        )
        for place, target in zip(places, ("Peru", "Mali", "Cuba", "Iran"), strict=True)
    ]


def tiny_trainer(solver: str, selector: str, **objective):
    """A backbone with four editable modules of two shapes, and a trainer over it."""
    model = tiny_model(
        "llama",
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        head_dim=HEAD,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_hidden_layers=3,
    )
    names = [f"model.layers.{{1-2}}.mlp.{part}_proj" for part in ("gate", "down")]
    backbone = Backbone(model, tiny_tokenizer(), names)
    chosen = {"kind": selector, "hidden": 8, "k": 2 if selector == "policy" else None}
    config = {
        "name": "watched",
        "selector": chosen,
        "updater": {"kind": "hypernetwork", "solver": solver, "rank": 4, "lam": 1.0},
        "objective": {"kind": "trajectory", "back_depth": 2, "c_reg": 1e-4, **objective},
        "passes": {"max": 2, "target_probability": 0.999, "undo": False},
    }
    config["updater"]["normalise"] = "none" if solver == "protected" else "running"
    config["updater"]["step"] = "unit" if solver == "protected" else "gradient"
    config["updater"]["eta"] = 0.05
    if solver == "protected":
        config["objective"]["rho"] = 1.0
    method = build_method(backbone, from_mapping(MethodConfig, config), requests())
    return backbone, method.trainer(TrainConfig())


def use_backend(backend: str, watcher: DenseWatcher, monkeypatch) -> None:
    """Commit by ``backend``, with working memory too small for a matrix of this size."""
    if backend == "cpp" and not extension.load().available:
        pytest.skip("the compiled extension is not built")
    monkeypatch.setenv("HIEDIT_BACKEND", backend)
    if backend == "reference":
        monkeypatch.setattr(hiedit.ledger.accumulate, "_CHUNK", 30 * MLP)
        # It rounds `base + acc`, the new weight, in one piece before it copies it into place.
        rounding = hiedit.ledger.state.materialize_

        def unwatched(*args, **kwargs):
            watcher.paused = True
            try:
                return rounding(*args, **kwargs)
            finally:
                watcher.paused = False

        monkeypatch.setattr(hiedit.ledger.state, "materialize_", unwatched)


def watched_edit(backbone, trainer, watcher: DenseWatcher):
    """One training edit under the watcher, after an unwatched one that makes Adam's state; the
    first commit to a module makes its accumulator and its copy of the base weight."""
    first, second, *_ = requests()
    trainer.edit(EditBatch((first,), 0))
    nothing = {
        name: Shift(torch.zeros(1, module.in_features), torch.zeros(module.out_features, 1))
        for name, module in backbone.modules.items()
    }
    trainer.rollout.env.state.commit(nothing)
    weights = [module.weight.data_ptr() for module in backbone.modules.values()]
    before = [module.weight.clone() for module in backbone.modules.values()]
    version = trainer.learner.version
    with watcher:
        step = trainer.edit(EditBatch((second,), 1))
    # The edit did all that a training edit does, or its silence would show nothing.
    assert step.passes == 2 and trainer.learner.version == version + 1
    assert trainer.learner.dropped == 0 and len(trainer.objective.past) == 2
    assert watcher.ops > 1000 and watcher.backward_ops > 0
    after = [module.weight for module in backbone.modules.values()]
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert sum(changed) >= 2
    assert [weight.data_ptr() for weight in after] == weights  # committed in place


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("selector", ["all", "policy"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_training_allocates_nothing_dense(solver, selector, backend, monkeypatch):
    watcher = DenseWatcher()
    use_backend(backend, watcher, monkeypatch)
    backbone, trainer = tiny_trainer(solver, selector)
    watched_edit(backbone, trainer, watcher)
    assert watcher.found == []
    parameters = list(backbone.model.parameters())
    assert all(p.grad is None and not p.requires_grad for p in parameters)


def test_a_reference_to_the_base_model_allocates_nothing_dense(monkeypatch):
    watcher = DenseWatcher()
    use_backend("reference", watcher, monkeypatch)
    backbone, trainer = tiny_trainer("protected", "policy", reference="base")
    watched_edit(backbone, trainer, watcher)
    assert watcher.found == []


def test_a_new_stream_allocates_nothing_dense(monkeypatch):
    watcher = DenseWatcher()
    use_backend("reference", watcher, monkeypatch)
    backbone, trainer = tiny_trainer("protected", "all")
    trainer.edit(EditBatch((requests()[0],), 0))
    with watcher:
        trainer.rollout.reset()
        trainer.objective.reset()
    assert watcher.ops > 0 and watcher.found == []


# ---- positive controls: the watcher does see what must not happen


def test_the_watcher_sees_a_dense_shift_in_training(monkeypatch):
    def dense_hook(stack: list[Shift]):
        def hook(_, args, out):
            for shift in stack:
                out = out + args[0] @ shift.dense().T
            return out

        return hook

    monkeypatch.setattr(hiedit.backbone.model, "_shift_hook", dense_hook)
    watcher = DenseWatcher()
    use_backend("reference", watcher, monkeypatch)
    backbone, trainer = tiny_trainer("outer", "all")
    watched_edit(backbone, trainer, watcher)
    assert any("aten.mm" in found and f"[{MLP}, {HIDDEN}]" in found for found in watcher.found)


def test_the_watcher_sees_a_dense_weight_gradient_in_training(monkeypatch):
    watcher = DenseWatcher()
    use_backend("reference", watcher, monkeypatch)
    backbone, trainer = tiny_trainer("outer", "all")
    backbone.modules["model.layers.2.mlp.gate_proj"].weight.requires_grad_()
    watched_edit(backbone, trainer, watcher)
    assert any("aten.mm" in found and f"[{MLP}, {HIDDEN}]" in found for found in watcher.found)


@pytest.mark.parametrize(
    "allocate",
    [
        lambda w: w.new_zeros(HIDDEN, MLP),
        lambda w: torch.randn(MLP, 3) @ torch.randn(3, HIDDEN),
        lambda w: torch.stack([w, w]),
        lambda w: w.flatten() + 1,
        lambda w: w.T.contiguous(),
        lambda w: w.bfloat16(),
        lambda w: w.clone(),
    ],
    ids=["zeros", "product", "stack", "flat", "transposed", "rounded", "clone"],
)
def test_the_watcher_sees(allocate):
    weight = torch.randn(MLP, HIDDEN)
    with DenseWatcher() as watcher:
        allocate(weight)
    assert watcher.found


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w.T,
        lambda w: w.view(-1)[:-1],
        lambda w: w.detach().mul_(2),
        lambda w: torch.randn(5, HIDDEN) @ w.T,
        lambda w: torch.zeros(HIDDEN, MLP, dtype=torch.bool),
        lambda w: w[:4].clone(),
    ],
    ids=["transpose", "slice", "in-place", "product", "bool", "part"],
)
def test_the_watcher_ignores(use):
    weight = torch.randn(MLP, HIDDEN)
    with DenseWatcher() as watcher:
        use(weight)
    assert watcher.found == []
