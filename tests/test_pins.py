"""What must not change unnoticed, because files that users have depend on it: the tags and keys of
every shipped method, and the bits of training and of edits.

``pins.json`` holds what they were when they were written down; ``HIEDIT_PIN=1 pytest
tests/test_pins.py`` writes it anew, which is right where a method's settings were changed on
purpose, and wrong where code was moved. Products of matrices have other last bits on another
processor or another torch, so bits are compared where they were written down, names everywhere.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from pathlib import Path

import pytest
import torch
from worlds import MODULES, quick

from hiedit.catalogue import choices, load_method
from hiedit.compare.cells import Cell, Setup
from hiedit.compare.config import HeterogeneousConfig
from hiedit.config import TrainConfig
from hiedit.experiment import load_backbone
from hiedit.extension import instruction_set
from hiedit.methods import build_method, save_editor
from hiedit.remember import memory_tag
from hiedit.runconfig import ModelConfig
from hiedit.types import EditBatch
from hiedit.world import world_requests

pytestmark = pytest.mark.usefixtures("one_thread")

PINS = Path(__file__).with_name("pins.json")
SHIPPED = choices("method")
TRAINED, EDITED = ("hiedit", "rledit"), ("closed-form", "ultraedit", "hiedit")
SETUP = Setup("world", ModelConfig(), HeterogeneousConfig(), TrainConfig(), 0.25, 128)


def machine() -> str:
    """What the last bits of a product depend on."""
    about = {"model name": platform.machine()}
    if (named := Path("/proc/cpuinfo")).exists():
        fields = (line.partition(":") for line in named.read_text().splitlines())
        about = {key.strip(): value.strip() for key, _, value in fields}
    kind = [about.get(key, "") for key in ("model name", "cpu family", "model", "stepping")]
    built = f"extension {instruction_set()}"
    torch_is = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    return ", ".join((torch_is, built, *kind))


def told(tensors: dict[str, torch.Tensor]) -> dict[str, dict]:
    """SHA-256 of all tensors, and their norms."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    norms = {name: float(value.double().norm()) for name, value in sorted(tensors.items())}
    return {"bits": digest.hexdigest(), "norms": norms}


@pytest.fixture(scope="module")
def pins():
    """What was written down; what this run found is added to it where that is asked for."""
    found = json.loads(PINS.read_text()) if PINS.exists() else {}
    yield found
    if os.environ.get("HIEDIT_PIN"):
        PINS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def holds(pins: dict, place: str, found: dict) -> None:
    """``found`` is what is written down at ``place``."""
    if os.environ.get("HIEDIT_PIN"):
        machines = pins.get(place, {}).get("machines", {}) | {machine(): found}
        pins[place] = {"names": list(found["norms"]), "machines": machines}
    kept = pins[place]
    assert list(found["norms"]) == kept["names"]
    if machine() not in kept["machines"]:
        pytest.skip(f"the bits were not written down on {machine()}; the names alone were compared")
    assert found == kept["machines"][machine()]  # the norms say how far it is, where it is not


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(ModelConfig(modules=MODULES, device="cpu"))


@pytest.fixture(scope="module")
def trained(backbone):
    """By name, a method after two training edits on the world."""
    requests, config = world_requests("train")[:64], TrainConfig(edits=2, stream_lengths=[2])
    found = {}
    for name in TRAINED:
        found[name] = build_method(backbone, quick(name), requests)
        found[name].trainer(config).run(requests, config, 0)
        found[name].rollout.reset()
    return found


@pytest.mark.parametrize("name", SHIPPED)
def test_a_methods_tag_in_ledgers_and_its_key_among_cells(pins, name):
    method = load_method(name)
    found = {"memory": memory_tag(method), "cell": Cell(SETUP, "measure", 0, (100,), method).key}
    if os.environ.get("HIEDIT_PIN"):
        pins.setdefault("methods", {})[name] = found
    assert found == pins["methods"][name]


def test_no_method_went_missing(pins):
    assert sorted(pins["methods"]) == SHIPPED


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_editor(pins, trained, tmp_path, name):
    from safetensors.torch import load_file

    directory = save_editor(trained[name], tmp_path)
    holds(pins, f"{name} trained", told(load_file(directory / "editor.safetensors")))


@pytest.mark.parametrize("name", EDITED)
def test_the_sum_of_five_edits(pins, trained, backbone, name):
    method = trained.get(name)
    if method is None:
        config = quick(name)
        less = dataclasses.replace(config.updater, own_text=min(config.updater.own_text, 16))
        config = dataclasses.replace(config, updater=less)
        method = build_method(backbone, config, world_requests("train")[:64])
    try:
        for step, request in enumerate(world_requests("test")[:5]):
            method.rollout.step(EditBatch((request,), step))
        holds(pins, f"{name} edits", told(method.rollout.env.state.accumulated()))
    finally:
        method.rollout.reset()
