"""Adapters: what peft makes of them is what was edited, within the error reported."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from exports import Edited, apart, dtypes, every, logits, weights_of
from models import tiny_model
from safetensors import safe_open
from torch import nn

from hiedit.ledger import lowrank
from hiedit.ledger.lowrank import factorise, measure

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'hiedit[peft]'")


def load(base, directory, **options):
    """Base and adapter by peft, on a copy; peft's own warnings about the adapter are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), directory, **options).eval()


@every
def test_peft_has_the_logits_of_the_edited_model(architecture, tmp_path):
    edited = Edited(architecture)
    report = edited.export(tmp_path / "a", base_name="some/base")
    assert report.exact and report.bound_met and report.worst.error < 1e-6
    wanted = logits(edited.model)
    assert apart(logits(edited.base), wanted) > 0.1  # the edits matter
    served = load(edited.base, tmp_path / "a")
    assert apart(logits(served), wanted) < 1e-5
    assert apart(logits(served.merge_and_unload()), wanted) < 1e-5


@every
def test_exact_adapters_hold_the_rank_rows_in_order(architecture, tmp_path):
    edited = Edited(architecture)
    report = edited.export(tmp_path / "a")
    assert [m.name for m in report.modules] == [n for n in edited.modules if n in edited.rows]
    for module in report.modules:
        A, B = weights_of(tmp_path / "a", module.name)
        assert torch.equal(A, edited.factors[module.name][0])
        assert torch.equal(B, edited.factors[module.name][1])
        assert module.rank == module.rows == len(A) and module.shape == (len(B), A.shape[1])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_half_precision(architecture, tmp_path):
    """peft serves W_0 x + B (A x) with the adapter in fp32, and merges as the ledger rounds."""
    edited = Edited(architecture, torch.bfloat16)
    report = edited.export(tmp_path / "a")
    served = load(edited.base, tmp_path / "a")
    kept = [p for n, p in served.named_parameters() if "lora_" in n]
    assert kept and all(p.dtype == torch.float32 for p in kept)
    unrounded = copy.deepcopy(edited.base).float()
    for module in report.modules:
        assert module.error < 1e-6 < 1e-3 < module.served_error < 1e-2
        unrounded.get_submodule(module.name).weight.data += edited.state.acc[module.name]
    truth = logits(unrounded)  # W_0 + acc, never rounded: what both approximate
    assert apart(logits(served), truth) < 1.5 * apart(logits(edited.model), truth) < 0.05
    merged = served.merge_and_unload()
    for module in report.modules:
        ours, theirs = (m.get_submodule(module.name).weight for m in (edited.model, merged))
        assert apart(theirs, ours) <= module.merged_error + 1e-7 < 1e-4
    assert apart(logits(merged), logits(edited.model)) < 0.01


@dtypes
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_outputs_of_modules_stay_within_the_reported_error(architecture, dtype, tmp_path):
    """|(W_0 + B A) x - W x| <= served_error |acc| |x|, beside the rounding of the outputs."""
    edited = Edited(architecture, dtype)
    report = edited.export(tmp_path / "a", rank=4)
    served = load(edited.base, tmp_path / "a")
    rounding = 3 * torch.finfo(dtype).eps
    for module in report.modules:
        x = torch.randn(64, module.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
        ours = edited.model.get_submodule(module.name)(x).double()
        theirs = served.get_submodule(f"base_model.model.{module.name}")(x).double()
        norm = edited.state.acc[module.name].double().norm()
        bound = module.served_error * norm * x.double().norm(dim=1) + rounding * ours.norm(dim=1)
        assert ((theirs - ours).norm(dim=1) <= bound).all()


# Rows fewer than either side, more than the smaller one, and not known at all.
@pytest.mark.parametrize("case", ["few rows", "many rows", "no rows"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_truncation_is_the_best_of_its_rank_and_its_error_is_reported(architecture, case, tmp_path):
    edited = Edited(architecture, edits=30 if case == "many rows" else 6)
    report = edited.export(tmp_path / "a", None if case == "no rows" else "known", rank=5)
    assert not report.exact and report.worst.error > 0.1
    for module in report.modules:
        A, B = weights_of(tmp_path / "a", module.name)
        delta = edited.delta(module.name).double()
        assert A.shape == (5, module.shape[1]) and B.shape == (module.shape[0], 5)
        assert module.error == pytest.approx(apart(B.double() @ A.double(), delta), rel=1e-5)
        best = torch.linalg.svdvals(delta)[5:].norm() / delta.norm()
        assert module.error == pytest.approx(best.item(), rel=1e-5)


@pytest.mark.parametrize("case", ["few rows", "many rows", "no rows"])
@pytest.mark.parametrize("bound", [0.5, 0.05, 1e-3])
def test_smallest_rank_within_an_error(case, bound, tmp_path):
    edited = Edited("gpt2", edits=30 if case == "many rows" else 4)
    report = edited.export(tmp_path / "a", None if case == "no rows" else "known", max_error=bound)
    assert report.bound_met
    for module in report.modules:
        delta = edited.delta(module.name).double()
        values = torch.linalg.svdvals(delta)
        assert module.error <= bound
        assert values[module.rank - 1 :].norm() / delta.norm() > bound


def test_a_rank_caps_what_an_error_asks_for(tmp_path):
    edited = Edited()
    report = edited.export(tmp_path / "a", rank=2, max_error=1e-3)
    assert {m.rank for m in report.modules} == {2} and not report.bound_met
    assert report.worst.error == max(m.error for m in report.modules) > 1e-3
    report = edited.export(tmp_path / "a", rank=30, max_error=0.6)
    assert report.bound_met and all(m.rank < m.rows for m in report.modules)


def test_logits_approach_the_edited_ones_as_the_error_falls(tmp_path):
    edited = Edited("opt", edits=14, fall=0.5)
    wanted, before = logits(edited.model), logits(edited.base)
    for bound in (0.3, 0.1, 0.03):
        report = edited.export(tmp_path / "a", max_error=bound)
        found = logits(load(edited.base, tmp_path / "a"))
        change = (found - wanted).norm() / (before - wanted).norm()
        assert 0 < report.worst.error <= bound and change < 3 * bound


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_delta_of_full_rank_is_exact_to_the_bit(architecture, tmp_path):
    edited = Edited(architecture, edits=30)
    report = edited.export(tmp_path / "a")
    assert report.exact and report.worst.error == 0
    for module in report.modules:
        A, B = weights_of(tmp_path / "a", module.name)
        assert module.rank == min(module.shape) < module.rows
        assert torch.equal(B @ A, edited.delta(module.name))
    assert apart(logits(load(edited.base, tmp_path / "a")), logits(edited.model)) < 1e-5


def test_without_rows_the_rank_is_found(tmp_path):
    edited = Edited()
    report = edited.export(tmp_path / "a", None)
    assert [m.rank for m in report.modules] == [len(edited.factors[m.name][0])
                                                for m in report.modules]  # fmt: skip
    assert report.worst.error < 1e-5 and not report.exact


def test_sketch_of_a_large_delta(monkeypatch):
    """Near the optimum on a slowly falling spectrum, repeatable, and no random state is used."""
    g = torch.Generator().manual_seed(2)
    left, right = (torch.linalg.qr(torch.randn(n, 200, generator=g)).Q for n in (200, 300))
    delta = (left / torch.arange(1, 201)) @ right.T
    best = [factorise(d, rank=8) for d in (delta, delta.T)]
    monkeypatch.setattr(lowrank, "_SKETCH_FROM", 100)
    state = torch.get_rng_state()
    for d, wanted in zip((delta, delta.T), best, strict=True):
        found = factorise(d, rank=8)
        assert torch.equal(found.A, factorise(d, rank=8).A)
        error = measure(d, torch.zeros_like(d), found).delta
        optimum = measure(d, torch.zeros_like(d), wanted).delta
        assert found.predicted == pytest.approx(error, rel=1e-4)
        assert optimum * (1 - 1e-6) <= error < optimum * 1.001
        assert not torch.equal(found.A, wanted.A)  # it was the sketch that was tested
    assert torch.equal(torch.get_rng_state(), state)


def lora_modules(model):
    found = [n for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    return [name.removeprefix("base_model.model.") for name in found]


@pytest.mark.parametrize("layers", ["1,11", "0-11"], ids=["two", "all"])
def test_a_name_that_begins_another_and_ranks_of_their_own(layers, tmp_path):
    """``layers.1`` and ``layers.11``; 24 targets, which peft condenses to suffixes."""
    patterns = [f"model.layers.{{{layers}}}.mlp.{p}_proj" for p in ("gate", "up")]
    model = tiny_model("llama", num_hidden_layers=12)
    edited = Edited(modules=patterns, model=model, edits=4)
    report = edited.export(tmp_path / "a")
    served = load(edited.base, tmp_path / "a")
    assert lora_modules(served) == [m.name for m in report.modules]
    assert len({m.rank for m in report.modules}) > 1
    for module in report.modules:
        layer = served.get_submodule(f"base_model.model.{module.name}")
        assert layer.r["default"] == module.rank and layer.scaling["default"] == 1
    assert apart(logits(served), logits(edited.model)) < 1e-5


def test_a_name_that_ends_another(tmp_path):
    """peft takes a listed target, and a rank, for every module whose name ends in it."""
    model = tiny_model("llama")
    model.tower = tiny_model("llama", seed=1)
    inner = [f"model.layers.{i}.mlp.up_proj" for i in range(3)]
    edited = Edited(modules=inner, model=model)
    edited.export(tmp_path / "a")
    assert lora_modules(load(edited.base, tmp_path / "a")) == inner
    both = [*inner, f"tower.{inner[1]}"]
    edited = Edited(modules=both, model=model, edits=4)
    report = edited.export(tmp_path / "b")
    assert [m.name for m in report.modules] == both
    assert [m.rank for m in report.modules] == [8, 6, 6, 4]
    served = load(edited.base, tmp_path / "b")
    assert lora_modules(served) == both
    for name in both:
        layer = served.get_submodule(f"base_model.model.{name}")
        assert layer.scaling["default"] == 1
        assert apart(layer.get_delta_weight("default"), edited.delta(name)) < 1e-6


def test_a_mixture_of_linear_and_conv1d(tmp_path):
    model = tiny_model("gpt2")
    mlp, old = model.transformer.h[1].mlp, model.transformer.h[1].mlp.c_fc
    mlp.c_fc = nn.Linear(*old.weight.shape)
    mlp.c_fc.load_state_dict({"weight": old.weight.T.clone(), "bias": old.bias})
    edited = Edited("gpt2", model=model)
    report = edited.export(tmp_path / "a")
    assert {edited.modules[m.name].conv1d for m in report.modules} == {False, True}
    with pytest.warns(UserWarning, match="fan_in_fan_out"):  # peft corrects it layer by layer
        served = peft.PeftModel.from_pretrained(copy.deepcopy(edited.base), tmp_path / "a")
    assert apart(logits(served.eval()), logits(edited.model)) < 1e-5
    assert apart(logits(served.merge_and_unload()), logits(edited.model)) < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_files_are_those_that_peft_writes(architecture, tmp_path):
    edited = Edited(architecture)
    edited.export(tmp_path / "ours", base_name="some/base")
    load(edited.base, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("ours", "theirs")
    )
    for config in (ours, theirs):
        config["target_modules"] = sorted(config["target_modules"])
    assert ours.items() <= theirs.items()
    defaults = json.loads(json.dumps(peft.LoraConfig().to_dict(), default=str))
    left_out = theirs.keys() - ours.keys() - {"peft_version"}
    assert {k: theirs[k] for k in left_out} == {k: defaults[k] for k in left_out}
    files = [
        safe_open(tmp_path / d / "adapter_model.safetensors", "pt") for d in ("ours", "theirs")
    ]
    assert files[0].metadata() == files[1].metadata() == {"format": "pt"}
    assert sorted(files[0].keys()) == sorted(files[1].keys())
    for key in files[0].keys():
        ours, theirs = (f.get_tensor(key) for f in files)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_base_and_adapter_by_name(tmp_path):
    edited = Edited()
    edited.base.save_pretrained(tmp_path / "base")
    edited.export(tmp_path / "a", base_name=str(tmp_path / "base"))
    served = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    assert apart(logits(served), logits(edited.model)) < 1e-5
