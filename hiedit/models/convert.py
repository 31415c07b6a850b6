"""A GGUF file as a Hugging Face directory: weights in float32, config, tokenizer.

header checked -> transformers' GGUF loader -> what it leaves behind put right -> written whole
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hiedit.models.cache import ABOUT, Tell, enough_space, made, note
from hiedit.models.header import Header, read_header

PACKAGES = ("gguf", "accelerate")
INSTALL = 'pip install "hiedit[models]", in a checkout pip install -e ".[models]"'
# Architectures that the loader reads and that are no causal language model.
_OTHERS = {"general", "tokenizer", "t5", "t5encoder", "umt5"}
# Vocabularies whose digits stand alone, which the loader splits as GPT-2's; and GPT-2's own.
_DIGITS = {"smollm", "starcoder", "refact", "codeshell"}
_AS_GPT2 = {"", "default", "gpt-2", "gpt2", "phi-2", "jais", "mpt", "olmo"}
_PROBE = "In 1984, the café's  12 guests\nsaid: “Olá”, naïvely."


def check(path: Path) -> Header:
    """The header of a GGUF file that can be converted here.

    Raises:
        ValueError: if it is no GGUF file, damaged, or of an architecture that is not supported.
        ImportError: if a package is missing, with the command that installs it.
    """
    header = read_header(path)
    known = architectures()
    if _plain(header.architecture) not in map(_plain, known):
        raise ValueError(
            f"{path}: architecture {header.architecture!r} is not supported; supported are "
            + ", ".join(known)
        )
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{path}: reading GGUF needs {' and '.join(missing)}: {INSTALL}")
    return header


def architectures() -> list[str]:
    """Return what transformers reads from GGUF files as a causal language model, sorted."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    names = set(GGUF_SUPPORTED_ARCHITECTURES)
    with contextlib.suppress(ImportError):  # a second list, since transformers 5.20
        from transformers.integrations.gguf import GGUF_ARCHS

        names |= set(GGUF_ARCHS)
    return sorted(names - _OTHERS)


def _plain(architecture: str) -> str:
    """Files say qwen2moe and gpt-oss where transformers says qwen2_moe and gpt_oss."""
    return architecture.replace("_", "").replace("-", "")


def convert(gguf: Path, target: Path, said: dict[str, Any], tell: Tell = note) -> Path:
    """Write the model in ``gguf`` to ``target``, whole or not at all; to be called under
    ``locked(target)``.

    Args:
        said: what hiedit.json is to say beside what the file says: ``sha256``, ``source``.

    Raises:
        ValueError: as ``check``; if the file is cut short; if the disk is too small; if what was
            written does not read back as it was.
    """
    header = check(gguf)
    enough_space(target.parent, 4 * header.parameters + (50 << 20))
    began = time.perf_counter()
    count = f"{header.parameters / 1e6:,.0f}M weights"
    tell(f"converting {gguf.name} ({header.architecture}, {count}) to float32, once")
    with made(target) as making:
        tokenizer, model = load(gguf, header, making, tell)
        with _quiet():
            model.save_pretrained(making)
            tokenizer.save_pretrained(making)
            _reads_back(making, tokenizer, gguf)
        sizes = {p.name: p.stat().st_size for p in sorted(making.iterdir())}
        parameters = sum(p.numel() for p in model.parameters())
        facts = {"format": 1, "gguf": gguf.name, "architecture": header.architecture}
        facts |= {"parameters": parameters, "licence": header.metadata.get("general.license", "")}
        facts |= said | {"versions": _versions(), "files": sizes}
        (making / ABOUT).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    tell(f"{target}: {sum(sizes.values()) / 1e6:,.0f} MB in {time.perf_counter() - began:.0f} s")
    return target


def load(gguf: Path, header: Header, scratch: Path, tell: Tell = note) -> tuple[Any, Any]:
    """The tokenizer and the model (float32) of a GGUF file, as if they had never been in one.

    scratch: a directory to link the file into: beside it, transformers would read other files.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    link = scratch / "model.gguf"
    link.symlink_to(gguf.resolve())
    arguments = {"gguf_file": link.name}
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(scratch), **arguments)
            model = AutoModelForCausalLM.from_pretrained(
                str(scratch), dtype=torch.float32, **arguments, **_dense()
            )
    except (ValueError, KeyError, IndexError, RuntimeError, OSError, struct.error) as error:
        what = " ".join(str(error).split())[:300].replace(str(link), gguf.name)
        raise ValueError(
            f"{gguf} ({header.architecture}): transformers' GGUF loader cannot read it, which may "
            f"be cut short ({gguf.stat().st_size:,} bytes): {what}"
        ) from None
    finally:
        link.unlink()
    tidy_model(model)
    tidy_tokenizer(tokenizer, header, model.config, tell)
    if "rope_freqs.weight" in header.tensors:
        tell(
            f"note: {gguf.name} scales its rotary frequencies for long texts, which transformers' "
            "GGUF loader leaves out: answers differ a little from those of the published checkpoint"
        )
    return tokenizer, model.eval()


def _dense() -> dict[str, Any]:
    """No weight stays in blocks, which newer transformers would keep for some architectures."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def tidy_model(model) -> None:
    """Takes off what makes ``save_pretrained`` refuse, and what is wrong in the config."""
    from transformers import GenerationConfig

    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    config = model.config
    for name in ("quantization_config", "_model_name_or_path"):
        if name in vars(config):
            delattr(config, name)
    config._name_or_path = ""
    for name, value in list(vars(config).items()):
        if isinstance(value, float):  # 9.999999747378752e-06: a float32, which 1e-05 is as well
            short = float(str(torch.tensor(value, dtype=torch.float32).numpy()))
            same = torch.tensor(short, dtype=torch.float32) == torch.tensor(value).float()
            setattr(config, name, short if same else value)
    ids = {k: getattr(config, k, None) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)


def tidy_tokenizer(tokenizer, header: Header, config, tell: Tell = note) -> None:
    """The splitting that the vocabulary was learned with, and no trace of the file's place."""
    from tokenizers import pre_tokenizers

    for name in ("is_local", "local_files_only", "gguf_file", "name_or_path"):
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.name_or_path = ""
    longest = getattr(config, "max_position_embeddings", None)
    if longest and tokenizer.model_max_length > longest:
        tokenizer.model_max_length = longest
    if header.metadata.get("tokenizer.ggml.model") != "gpt2":
        return
    core, split = tokenizer.backend_tokenizer, header.metadata.get("tokenizer.ggml.pre", "")
    if split in _DIGITS:
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif split not in _AS_GPT2 and isinstance(core.pre_tokenizer, pre_tokenizers.ByteLevel):
        tell(f"note: transformers does not know how {split!r} splits text, and splits as GPT-2")


def _reads_back(directory: Path, tokenizer, gguf: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    AutoConfig.from_pretrained(directory)
    again = AutoTokenizer.from_pretrained(directory)
    one, other = (t(_PROBE)["input_ids"] for t in (tokenizer, again))
    if one != other or len(tokenizer) != len(again):
        raise ValueError(f"{gguf}: its tokenizer does not read back as it was written")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the loader's own bars and warnings, of which some are written straight to stderr.
    What packages say on standard output as they are imported goes to stderr: a program may read the
    output of this one."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _versions() -> dict[str, str]:
    found = {}
    for name in ("hiedit", "torch", "transformers", "gguf"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
