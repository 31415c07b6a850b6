"""What an editor that is opened again finds in its ledger: whose memory it is, and its contexts."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import yaml
from models import tiny_model, tiny_tokenizer

from hiedit.config import MethodConfig, UpdaterConfig, from_mapping
from hiedit.editor import Editor
from hiedit.guard import Guard
from hiedit.provenance import digest
from hiedit.remember import LATER, memory_tag
from hiedit.types import EditRequest

pytestmark = pytest.mark.usefixtures("one_thread")

MODULES = ["model.layers.{0-1}.mlp.down_proj"]
PRESERVE = [("Rome lies in", "Italy"), ("Lima is in", "Peru"), ("Ink is", "blue")]
OSLO, BONN = EditRequest("Oslo lies in", "Peru"), EditRequest("Bonn lies in", "Mali")
# Two methods as ledgers of version 0.1 know them, and the tags under which they keep their memory.
CLOSED_FORM = {
    "name": "closed-form",
    "selector": {"kind": "all"},
    "updater": {"kind": "closed_form", "solver": "protected", "normalise": "none", "step": "unit",
                "tokens": "answer", "eta": 0.1},
    "objective": {"kind": "none"},
    "passes": {"max": 10, "target_probability": 0.8},
}  # fmt: skip
HIEDIT = {
    "name": "hiedit",
    "selector": {"kind": "policy", "init": "effects", "init_scale": 2.0, "hidden": 64,
                 "lr": 2.0e-5},
    "updater": {"kind": "hypernetwork", "solver": "protected", "normalise": "none", "step": "unit",
                "tokens": "answer", "eta": 0.08, "lam": 0.02, "phrasing": 10.0, "preserve": 5000,
                "absorb": 0.02, "rank": 64, "blocks": 2, "lr": 3.0e-5, "lr_step": 1.0e-3},
    "objective": {"kind": "trajectory", "back_depth": 10, "gamma": 0.95, "c_loc": 10.0,
                  "rho": 2000.0},
    "passes": {"max": 24, "target_probability": 0.98, "preserved": 4, "rehearsed": 4,
               "screened": 32},
}  # fmt: skip


@pytest.mark.parametrize(
    ("values", "tag"),
    [
        (CLOSED_FORM, "bd5f50d917e120116bf55b0338a4caf2389f16b494716ff28361a140ab5ff676"),
        (HIEDIT, "fec29c4a07d7ff4a4b6f51007ae545d545d6cc506535efeaf3dcd512df1bd683"),
    ],
    ids=["closed-form", "hiedit"],
)
def test_ledgers_keep_their_memory(values, tag):
    """A setting that is added must be in ``LATER``, or every method forgets."""
    assert memory_tag(from_mapping(MethodConfig, values)) == tag


def test_every_setting_tells_methods_apart():
    plain = MethodConfig()
    assert memory_tag(plain) == memory_tag(MethodConfig()) != digest(repr(plain))
    tags = {memory_tag(plain)}
    for name, value in (("contexts", 5), ("eta", 0.5), ("tokens", "subject")):
        updater = dataclasses.replace(plain.updater, **{name: value})
        tags.add(memory_tag(dataclasses.replace(plain, updater=updater)))
    assert len(tags) == 4
    fields = {f.name: f.default for f in dataclasses.fields(UpdaterConfig)}
    assert all(fields[name] is not dataclasses.MISSING for name in LATER[UpdaterConfig])


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=2)


@pytest.fixture
def opened(model, tmp_path):
    """Opens the same ledger with any seed and number of contexts."""

    def run(seed: int, contexts: int = 2) -> Editor:
        values = {
            "name": "subject",
            "updater": {"tokens": "subject", "contexts": contexts, "preserve_tokens": "all"},
            "passes": {"max": 2, "undo": False},
        }
        path = tmp_path / f"method-{contexts}.yaml"
        path.write_text(yaml.safe_dump(values))
        return Editor.from_pretrained(
            copy.deepcopy(model), tiny_tokenizer(), str(path), MODULES,
            ledger=tmp_path / "edits", preserve=PRESERVE, seed=seed,
            guard=Guard(max_kl=None, max_drift=None),
        )  # fmt: skip

    return run


def texts(editor) -> tuple[str, ...]:
    return editor._rollout.contexts


def test_opened_again_it_edits_behind_the_same_contexts(opened):
    with opened(0) as editor:
        drawn = texts(editor)
        editor.edit([OSLO])
    with opened(1) as editor:
        assert texts(editor) == drawn and len(drawn) == 2
        editor.edit([BONN])
    with opened(2) as editor:
        assert texts(editor) == drawn
        assert len(editor.history()) == 2


def test_also_after_a_crash(opened):
    editor = opened(0)
    drawn = texts(editor)
    editor.edit([OSLO])
    editor.ledger.close()  # and nothing more
    with opened(1) as editor:
        assert texts(editor) == drawn


def test_nothing_is_kept_before_the_first_edit(opened):
    with opened(0) as editor:
        first = texts(editor)
        list(editor.apply([OSLO], dry_run=True))
    with opened(1) as editor:
        assert texts(editor) != first


def test_another_method_draws_its_own(opened):
    with opened(0) as editor:
        first = texts(editor)
        editor.edit([OSLO])
    with opened(1, contexts=3) as editor:
        assert len(texts(editor)) == 3
    with opened(1, contexts=0) as editor:
        assert texts(editor) == ()
        editor.edit([BONN])
    with opened(1) as editor:  # neither of them took its place
        assert texts(editor) == first
