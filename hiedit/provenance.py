"""The origin of a run, as flat text: versions, the commit, the configuration."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = ("hiedit", "torch", "transformers", "numpy", "triton", "deepspeed", "ray", "mlflow")


@functools.cache
def environment_tags() -> dict[str, str]:
    """Versions of Python and of the packages that matter, and the commit of this source tree."""
    tags = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            tags[f"version.{package}"] = importlib.metadata.version(package)
    here = Path(__file__)
    # an installed copy inside somebody else's repository must not report that one's commit
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is not None:
        if commit := _git(here.parent, "rev-parse", "HEAD"):
            tags["git_commit"] = tags["mlflow.source.git.commit"] = commit
            dirty = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
            tags["git_dirty"] = str(bool(dirty)).lower()
    return tags


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command, None where it fails or there is no git."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``; an empty mapping is a leaf."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        nested = isinstance(value, Mapping) and value
        found |= leaves(value, f"{name}.") if nested else {name: value}
    return found


def flatten(config: Mapping[str, Any]) -> dict[str, str]:
    """``leaves`` as text: strings as they are, everything else as JSON."""
    found = leaves(config).items()
    return {n: v if isinstance(v, str) else json.dumps(v) for n, v in found}


def cut(value: Any, limit: int) -> str:
    """``value`` as text; what is too long is cut and ends in the SHA-256 of the whole."""
    text = str(value)
    if len(text) <= limit:
        return text
    mark = f"… sha256:{digest(text)}"
    return text[: limit - len(mark)] + mark


def digest(text: str) -> str:
    """SHA-256 of ``text`` in hex."""
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
