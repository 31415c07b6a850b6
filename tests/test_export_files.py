"""The files of an export: merged checkpoints, reports, refusals, and all or nothing."""

from __future__ import annotations

import json
import os

import pytest
import torch
from backbones import hooks
from exports import Edited, dtypes, every, logits
from models import tiny_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hiedit.ledger.directory import REPORT
from hiedit.ledger.export import export_adapter, save_merged
from hiedit.ledger.state import DeltaState


def test_the_report_lies_beside_the_adapter(tmp_path):
    report = Edited().export(tmp_path / "new" / "a", rank=4, base_name="some/base")
    files = {p.name: p for p in report.directory.iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", REPORT}
    written = json.loads(files[REPORT].read_text())
    assert written["kind"] == "adapter" and written["exact"] is False
    assert written["worst"] == report.worst.name and written["rank"] == 4
    assert [m["error"] for m in written["modules"]] == [m.error for m in report.modules]
    assert written["bytes"] == report.bytes == files["adapter_model.safetensors"].stat().st_size
    plain = tmp_path / "plain"
    plain.touch()  # safetensors alone would let only the owner read its files
    assert {p.stat().st_mode for p in files.values()} == {plain.stat().st_mode}


@dtypes
def test_exporting_leaves_the_model_as_it_is(dtype, tmp_path):
    edited = Edited("llama", dtype)
    before = {name: t.clone() for name, t in edited.model.state_dict().items()}
    edited.export(tmp_path / "a", rank=3)
    save_merged(tmp_path / "m", edited.backbone)
    assert hooks(edited.model) == 0
    assert not any(p.requires_grad for p in edited.model.parameters())
    assert all(torch.equal(before[name], t) for name, t in edited.model.state_dict().items())


def test_unedited_modules_get_no_entry(tmp_path):
    edited = Edited()
    first = next(iter(edited.rows))
    edited.state.acc[first].zero_()  # as after all of its edits were reverted
    report = edited.export(tmp_path / "a", None)
    assert [m.name for m in report.modules] == [n for n in edited.modules
                                                if n in edited.rows and n != first]  # fmt: skip


def test_nothing_edited(tmp_path):
    edited = Edited()
    edited.state.reset()
    with pytest.raises(ValueError, match="no module is edited"):
        edited.export(tmp_path / "a")
    with pytest.raises(ValueError, match="no module is edited"):
        export_adapter(tmp_path / "a", edited.model, DeltaState(edited.modules))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"rank": True}, "rank is True"),
        ({"max_error": 0.0}, "max_error is 0.0"),
        ({"max_error": 1}, "max_error is 1"),
        ({"max_error": float("nan")}, "max_error is nan"),
    ],
)
def test_wrong_requests(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Edited(edits=1).export(tmp_path / "a", **options)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("rank", [None, 3])
def test_rows_of_other_edits_are_refused(rank, tmp_path):
    edited = Edited()
    name = "model.layers.1.mlp.gate_proj"
    A, B = edited.factors[name]
    for wrong in ((A[:-1], B[:, :-1]), (A, B * 1.01), (A.flip(0), B)):
        with pytest.raises(ValueError, match="do not multiply to the delta"):
            edited.export(tmp_path / "a", {name: wrong}, rank=rank)
    with pytest.raises(ValueError, match=r"A must be \[R, 32\] and B \[80, R\], got \(80, 4\)"):
        edited.export(tmp_path / "a", {name: (B, A)})
    with pytest.raises(ValueError, match="'lm_head' is not one of"):
        edited.export(tmp_path / "a", {"lm_head": (A, B)})
    assert not any(tmp_path.iterdir())


def test_a_state_of_another_model_and_a_delta_that_is_not_finite(tmp_path):
    edited = Edited()
    with pytest.raises(ValueError, match="is not the one of that name"):
        export_adapter(tmp_path / "a", edited.base, edited.state)
    next(iter(edited.state.acc.values()))[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        edited.export(tmp_path / "a", None)


def test_only_an_earlier_export_is_replaced(tmp_path):
    edited, place = Edited(), tmp_path / "a"
    place.mkdir()
    first = edited.export(place)  # an empty directory is taken
    second = edited.export(place, rank=2)
    assert second.bytes < first.bytes
    save_merged(place, edited.backbone)  # of the other kind: nothing of the adapter is left
    assert (place / "model.safetensors").exists() and not (place / "adapter_config.json").exists()
    (place / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"'notes.txt' \(1 of \d+ files"):
        edited.export(place)
    assert (place / "notes.txt").exists() and (place / "model.safetensors").exists()
    edited.export(place, overwrite=True)
    assert not (place / "notes.txt").exists()
    (place / "inner").mkdir()
    for write in (edited.export, lambda d, **o: save_merged(d, edited.model, **o)):
        with pytest.raises(ValueError, match="the directory 'inner'"):
            write(place, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        edited.export(place / "adapter_config.json")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("step", ["fsync", "first rename", "second rename"])
def test_a_failure_leaves_the_earlier_export(step, tmp_path, monkeypatch):
    edited = Edited()
    edited.export(tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    rename = os.rename

    def failing(source, *rest):
        if step != "second rename" or str(source).endswith(".tmp"):
            raise OSError(28, "No space left on device")
        rename(source, *rest)

    monkeypatch.setattr(f"os.{step.split()[-1]}", failing)
    with pytest.raises(OSError, match="No space left"):
        edited.export(tmp_path / "a", rank=2)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@dtypes
@every
def test_a_merged_checkpoint_has_every_bit(architecture, dtype, tmp_path):
    edited = Edited(architecture, dtype)
    save_merged(tmp_path / "m", edited.backbone)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert_same_model(found, edited.model)
    assert torch.equal(logits(found), logits(edited.model))
    text = "The capital"
    ours, theirs = edited.backbone.tokenizer, AutoTokenizer.from_pretrained(tmp_path / "m")
    assert theirs(text)["input_ids"] == ours(text)["input_ids"]


def assert_same_model(found, wanted):
    ours, theirs = wanted.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys()
    for name, t in ours.items():
        assert theirs[name].dtype == t.dtype and torch.equal(theirs[name], t), name


@pytest.mark.parametrize("tied", [False, True])
def test_merged_from_within_hooks_with_replaced_weights(tied, tmp_path):
    """Whatever stands in the modules is saved: here new parameters, views of one buffer."""
    model = tiny_model("llama", tie_word_embeddings=tied)
    edited = Edited(model=model, dtype=torch.bfloat16)
    first, second = (edited.model.model.layers[i].mlp for i in (1, 2))
    buffer = torch.randn(2, *first.gate_proj.weight.shape).bfloat16()
    first.gate_proj.weight = nn.Parameter(buffer[0])
    second.gate_proj.weight.data = buffer[1]
    first.up_proj.weight.data = torch.randn(32, 80).bfloat16().T  # not contiguous
    with edited.backbone.capture():
        save_merged(tmp_path / "m", edited.model, edited.backbone.tokenizer)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert_same_model(found, edited.model)
    shared = found.get_output_embeddings().weight is found.get_input_embeddings().weight
    assert shared == tied
    assert ("lm_head.weight" in load_file(tmp_path / "m" / "model.safetensors")) != tied
    assert hooks(found) == 0


def test_a_model_of_two_dtypes_is_not_saved(tmp_path):
    edited = Edited(dtype=torch.bfloat16)
    edited.model.model.norm.float()
    with pytest.raises(ValueError, match="model.norm.weight is torch.float32"):
        save_merged(tmp_path / "m", edited.model)
    assert not any(tmp_path.iterdir())
