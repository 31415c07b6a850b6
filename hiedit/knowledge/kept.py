"""Tensors measured once for a model, kept in the cache by module.

CACHE/KIND/KEY/MODULE.safetensors, KEY from the model's weights and from what was measured. Only
saves time: a file that is missing, damaged or without what it should hold is measured again, and a
disk that cannot be written to is no failure.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hiedit.backbone.model import Backbone
from hiedit.durable import replacing
from hiedit.models.cache import cache_dir
from hiedit.models.identity import fingerprint

WORTH = 20_000_000  # parameters; a smaller model is measured before a file is read
Parts = dict[str, Tensor]


def worth_keeping(backbone: Backbone) -> bool:
    """Tell whether reading what was measured of this model takes less time than measuring it."""
    return sum(p.numel() for p in backbone.model.parameters()) >= WORTH


def kept(
    backbone: Backbone,
    kind: str,
    about: Any,
    measure: Callable[[], Mapping[str, Parts]],
    needs: Collection[str],
) -> dict[str, Parts]:
    """Return, by module, what ``measure`` gives, from the cache where all modules are there.

    about: JSON, what besides the model decides the measurement. needs: the tensors that every
    module's file has to hold.
    """
    if not worth_keeping(backbone):
        return dict(measure())
    place = cache_dir() / kind / _key(backbone, about)
    found = {name: _read(place / f"{name}.safetensors", needs) for name in backbone.names}
    if any(parts is None for parts in found.values()):
        found = dict(measure())
        for name, parts in found.items():
            _write(place / f"{name}.safetensors", parts)
    return {n: {k: t.to(backbone.device) for k, t in parts.items()} for n, parts in found.items()}


def _key(backbone: Backbone, about: Any) -> str:
    tokenizer = backbone.tokenizer
    said = json.dumps([about, type(tokenizer).__name__, len(tokenizer)])
    return hashlib.sha256((fingerprint(backbone.model) + said).encode()).hexdigest()[:24]


def _read(path: Path, needs: Collection[str]) -> Parts | None:
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        return None
    return found if found.keys() >= set(needs) else None


def _write(path: Path, parts: Parts) -> None:
    with contextlib.suppress(OSError, SafetensorError), replacing(path) as temporary:
        save_file({n: t.contiguous().cpu() for n, t in parts.items()}, temporary)
