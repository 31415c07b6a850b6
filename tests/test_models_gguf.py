"""A GGUF file as a model: read, edited, reverted bit for bit, exported, read again."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from commands import METHOD, call, good, mistake, write
from models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hiedit import Editor, EditRequest
from hiedit.experiment import load_backbone
from hiedit.guard import Guard
from hiedit.models import convert as converting
from hiedit.models import converted, resolve
from hiedit.models.header import read_header
from hiedit.runconfig import ModelConfig

ggufs = pytest.importorskip("ggufs", reason="the packages gguf and accelerate are not installed")

FAMILIES = ("llama", "qwen2")
TEXTS = ["The capital of France is", "In 1984,  12 cafés\n", "of the, Ünïcode 東京"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HIEDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny():
    """A Qwen2 of random weights whose vocabulary is that of the files."""
    return tiny_model("qwen2", vocab_size=len(ggufs.TOKENS), bos_token_id=0, eos_token_id=1)


@pytest.fixture
def file(tiny, tmp_path):
    return ggufs.write_gguf(tmp_path / "tiny.gguf", tiny)


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_the_model_that_was_written(family, tmp_path):
    model = tiny_model(family, vocab_size=len(ggufs.TOKENS), bos_token_id=0, eos_token_id=1)
    file = ggufs.write_gguf(tmp_path / "tiny.gguf", model)
    directory = resolve(str(file))
    read = AutoModelForCausalLM.from_pretrained(directory)
    assert read.dtype == torch.float32 and read.config.model_type == family
    assert read.config.rms_norm_eps == model.config.rms_norm_eps
    for name, value in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], value), name
    ids = torch.randint(0, len(ggufs.TOKENS), (3, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(read, ids), logits(model, ids))


def test_what_is_written_says_nothing_of_a_quantisation_and_tokenises_all(file):
    directory = resolve(str(file))
    config = json.loads(Path(directory, "config.json").read_text())
    assert "quantization_config" not in config and "_model_name_or_path" not in config
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert len(tokenizer) == len(ggufs.TOKENS) and tokenizer.eos_token == "<|im_end|>"
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert max(ids) < len(ggufs.TOKENS) and tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer(" the")["input_ids"]) == ["Ġthe"]
    assert tokenizer("a<|im_end|>")["input_ids"][-1] == 1


def test_digits_stand_alone_where_the_vocabulary_was_learned_so(tmp_path):
    """Of two spaces before a digit GPT-2's rule gives the second to the number."""
    llama = tiny_model("llama", vocab_size=len(ggufs.TOKENS))
    file = ggufs.write_gguf(tmp_path / "digits.gguf", llama, split="smollm")
    tokenizer = AutoTokenizer.from_pretrained(resolve(str(file)))
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in  1984")
    assert [piece for piece, _ in split] == ["in", "ĠĠ", "1", "9", "8", "4"]


def test_a_file_is_edited_reverted_and_exported(file, tmp_path):
    (tmp_path / "closed.yaml").write_text(METHOD.replace("max: 10", "max: 3"))
    requests = [EditRequest("The capital of France is", "Lyon"),
                EditRequest("The river of Rome is the", "Rhone")]  # fmt: skip
    with Editor.from_pretrained(
        str(file),
        method=str(tmp_path / "closed.yaml"),
        ledger=tmp_path / "ledger",
        guard=Guard(max_kl=None, max_drift=None),
    ) as editor:
        before = {n: m.weight.clone() for n, m in editor._env.backbone.modules.items()}
        ids = editor.edit(requests)
        edited = {n: m.weight.clone() for n, m in editor._env.backbone.modules.items()}
        assert len(ids) == 2 and any(not torch.equal(edited[n], before[n]) for n in before)
        editor.revert(ids)
        for name, module in editor._env.backbone.modules.items():
            assert torch.equal(module.weight, before[name]), name
        editor.restore(ids)
        out = editor.save_pretrained(tmp_path / "merged")
        tokens = editor.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
        expected = logits(editor.model, tokens)
    again = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(again, tokens), expected)
    assert (
        AutoTokenizer.from_pretrained(out)(TEXTS)["input_ids"]
        == AutoTokenizer.from_pretrained(resolve(str(file)))(TEXTS)["input_ids"]
    )


def test_a_file_goes_wherever_a_model_is_expected_on_the_command_line(file, tmp_path):
    (tmp_path / "closed.yaml").write_text(METHOD)
    rows = write(tmp_path / "rows.jsonl", {"prompt": "The capital of France is", "target": "Lyon"})
    ledger, model = tmp_path / "ledger", ["--model", file]
    method = ["--method", tmp_path / "closed.yaml"]
    free = ["--max-kl", "none", "--max-drift", "none"]  # of a model that knows nothing
    good(call("edit", *model, "--input", rows, "--ledger", ledger, *method, *free))
    assert "1 edit" in good(call("verify", "--ledger", ledger, *model))
    good(call("export", "--ledger", ledger, *model, "--format", "merged", "--out", tmp_path / "m"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").config.model_type == "qwen2"
    assert "It fits." in good(call("plan", *model, "--method", "closed-form"))
    assert "tiny.gguf" in good(call("models"))


def test_a_file_is_converted_and_read_whole_once(file, monkeypatch, cache):
    first = load_backbone(ModelConfig("tiny", str(file)))
    assert next(first.model.parameters()).dtype == torch.float32
    assert list(converted()) == [cache / "models" / p.name for p in (cache / "models").glob("gg*")]

    def not_again(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(converting, "load", not_again)
    monkeypatch.setattr("hashlib.file_digest", not_again)
    assert resolve(str(file)) == str(next(iter(converted())))


def test_a_file_that_changed_is_another_model(file, tmp_path):
    first = resolve(str(file))
    other = tiny_model("qwen2", seed=1, vocab_size=len(ggufs.TOKENS))
    ggufs.write_gguf(file, other)
    second = resolve(str(file))
    assert first != second
    read = AutoModelForCausalLM.from_pretrained(second)
    assert torch.equal(read.model.norm.weight, other.model.norm.weight)


def test_an_interrupted_conversion_leaves_nothing_that_counts(file, monkeypatch, cache):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(converting, "_reads_back", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve(str(file))
    assert not converted() and not [p for p in (cache / "models").iterdir() if p.is_dir()]
    monkeypatch.undo()
    monkeypatch.setenv("HIEDIT_CACHE", str(cache))
    AutoModelForCausalLM.from_pretrained(resolve(str(file)))


def test_what_a_killed_process_left_is_removed_and_a_damaged_copy_made_anew(file, cache):
    directory = resolve(str(file))
    left = cache / "models" / f".{Path(directory).name}-killed"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    with open(f"{directory}/model.safetensors", "r+b") as weights:
        weights.truncate(100)
    assert not converted()
    assert resolve(str(file)) == directory and converted() and not left.exists()
    AutoModelForCausalLM.from_pretrained(directory)


def test_who_begins_together_converts_once(file):
    """A lock belongs to an open file, so threads meet at it as processes do."""
    said: list[str] = []
    with ThreadPoolExecutor(3) as pool:
        found = set(pool.map(lambda _: resolve(str(file), tell=said.append), range(3)))
    assert len(found) == 1 and sum(line.startswith("converting") for line in said) == 1, said


def test_what_is_wrong_with_a_file_is_said(file, tiny, tmp_path, monkeypatch):
    (tmp_path / "no.gguf").write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(ValueError, match=r"no\.gguf: no GGUF file: it begins with b'PK"):
        resolve(str(tmp_path / "no.gguf"))
    with pytest.raises(ValueError, match=r"gone\.gguf'?: there is no such file"):
        resolve(str(tmp_path / "gone.gguf"))
    strange = ggufs.write_gguf(tmp_path / "strange.gguf", tiny, architecture="bert")
    with pytest.raises(ValueError, match=r"strange\.gguf: architecture 'bert' .* llama, .*qwen2"):
        resolve(str(strange))
    data = file.read_bytes()
    (tmp_path / "header.gguf").write_bytes(data[:300])
    with pytest.raises(ValueError, match=r"header\.gguf: it ends in its header"):
        resolve(str(tmp_path / "header.gguf"))
    (tmp_path / "short.gguf").write_bytes(data[:-4000])
    with pytest.raises(ValueError, match=r"short\.gguf .*cut short"):
        resolve(str(tmp_path / "short.gguf"))
    with pytest.raises(ValueError, match=r"give the file, .*\.gguf"):
        resolve(str(tmp_path))
    mistake(call("edit", "--model", tmp_path / "no.gguf", "--input", tmp_path / "x"), "no such")
    assert not converted()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match="HIEDIT_CACHE"):
        resolve(str(file))


def test_a_missing_package_is_named_with_its_command(file, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"gguf and accelerate: pip install \"hiedit\[models\]"):
        resolve(str(file))


def test_the_header_has_names_and_shapes(file, tiny):
    header = read_header(file)
    assert header.architecture == "qwen2"
    assert header.metadata["tokenizer.ggml.tokens"] == len(ggufs.TOKENS)
    shape = tuple(tiny.model.layers[1].mlp.down_proj.weight.shape)
    assert header.tensors["blk.1.ffn_down.weight"] == shape
    assert header.parameters == sum(p.numel() for p in tiny.parameters())
