"""Moments of keys on knowledge to preserve, measured once for a model and kept.

CACHE/moments/KEY/MODULE.safetensors, KEY from the model's weights, the sentences and the positions
at which keys are taken. Only saves time: a file that is missing or damaged is measured again, and
a disk that cannot be written to is no failure.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hiedit.backbone.model import Backbone
from hiedit.backbone.moments import KeyMoments, key_moments
from hiedit.data.subjects import find_subject
from hiedit.data.tokens import encode
from hiedit.models.cache import cache_dir
from hiedit.models.identity import fingerprint
from hiedit.types import TokenBatch

Pair = tuple[str, str]
FORMAT = 2  # of the files
BATCH = 64  # sentences in one forward pass
WORTH = 20_000_000  # parameters; a smaller model is measured before a file is read
Tell = Callable[[int, int], None]  # sentences done, of how many


def moments_of(
    backbone: Backbone,
    pairs: Sequence[Pair],
    tokens: str,
    tell: Tell = lambda done, total: None,
) -> dict[str, KeyMoments]:
    """By module, the moments of its keys on sentences made of ``pairs`` (beginning, ending), at
    the positions that ``edit_tokens`` calls ``tokens``; from the cache where they are there."""
    batches = _batches(backbone, pairs, tell)
    if sum(p.numel() for p in backbone.model.parameters()) < WORTH:
        return key_moments(backbone, batches, tokens)
    place = cache_dir() / "moments" / _key(backbone, pairs, tokens)
    found = {name: _read(place / f"{name}.safetensors") for name in backbone.names}
    if any(moments is None for moments in found.values()):
        found = key_moments(backbone, batches, tokens)
        for name, moments in found.items():
            _write(place / f"{name}.safetensors", moments)
    device = backbone.device
    return {n: KeyMoments(*(_on(device, part) for part in m)) for n, m in found.items()}


def _batches(backbone: Backbone, pairs: Sequence[Pair], tell: Tell) -> Iterator[TokenBatch]:
    """Of like lengths, so that little is padding; the order of the sums is that of the lengths."""
    if sum(p.numel() for p in backbone.model.parameters()) >= WORTH:
        pairs = sorted(pairs, key=lambda pair: len(pair[0]))
    for start in range(0, len(pairs), BATCH):
        tell(start, len(pairs))
        some = list(pairs[start : start + BATCH])
        spans = [find_subject(prompt) for prompt, _ in some]
        batch = encode(backbone.tokenizer, some, padding_side="left", subjects=spans)
        yield batch.to(backbone.device)
    tell(len(pairs), len(pairs))


def _key(backbone: Backbone, pairs: Sequence[Pair], tokens: str) -> str:
    tokenizer = backbone.tokenizer
    cut = [type(tokenizer).__name__, len(tokenizer)]
    said = json.dumps([FORMAT, sorted(map(list, pairs)), tokens, cut])
    return hashlib.sha256((fingerprint(backbone.model) + said).encode()).hexdigest()[:24]


def _read(path: Path) -> KeyMoments | None:
    try:
        parts = load_file(path)
        return KeyMoments(
            parts["moment"], parts["power"], parts.get("sinks"), float(parts["ratio"]),
            parts["typical"], parts.get("subjects"),
        )  # fmt: skip
    except (OSError, SafetensorError, KeyError):
        return None


def _write(path: Path, moments: KeyMoments) -> None:
    parts = {"moment": moments.moment, "power": moments.power, "typical": moments.typical}
    parts["ratio"] = torch.tensor(moments.ratio)
    for name in ("sinks", "subjects"):
        if (part := getattr(moments, name)) is not None:
            parts[name] = part
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous().cpu() for n, t in parts.items()}, temporary)
        os.replace(temporary, path)


def _on(device: torch.device, part):
    return part.to(device) if isinstance(part, torch.Tensor) else part
