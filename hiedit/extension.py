"""Loads the compiled extension `hiedit._C` where it was built, and says why where it was not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch  # noqa: F401  (its libraries must be in the process before the extension's)

REMEDY = (
    "install a C++ compiler (g++ or clang++), then run "
    "`pip install --no-build-isolation -e .` (or `make setup`) in HiEdit's repository"
)


@dataclass(frozen=True)
class Extension:
    """The state of `hiedit._C`: ``reason`` is None where its operators can be called."""

    path: str | None
    reason: str | None

    @property
    def available(self) -> bool:
        return self.reason is None


@functools.cache
def load() -> Extension:
    """Imports `hiedit._C`, which registers ``torch.ops.hiedit``; never raises."""
    spec = importlib.util.find_spec("hiedit._C")
    if spec is None:
        return Extension(None, _why_not_built())
    try:
        importlib.import_module("hiedit._C")
    except ImportError as error:
        # Nearly always a PyTorch that changed after the build: its C++ symbols are not stable.
        reason = f"{spec.origin} does not load with torch {torch.__version__}: {error}"
        return Extension(spec.origin, reason)
    return Extension(spec.origin, None)


def _why_not_built() -> str:
    """Return what setup.py left behind when it tried and failed, in a checkout."""
    log = Path(__file__).parents[1] / "build" / "extension-error.txt"
    return f"it was not built ({log.read_text().strip()})" if log.exists() else "it was not built"


def instruction_set() -> str | None:
    """The instruction set that the extension uses on this CPU, None where it is not available."""
    return torch.ops.hiedit.instruction_set() if load().available else None
