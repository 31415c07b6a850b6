"""The choice of the code that does the ledger's arithmetic, made in this one place.

| backend | where | needs |
|---|---|---|
| triton | GPU; CPU under Triton's interpreter, for tests | the package triton |
| cuda | GPU | hiedit._C, built where PyTorch has CUDA and nvcc is there |
| cpp | CPU | hiedit._C |
| reference | anywhere | nothing |

All give the same bits. ``auto`` takes the first of the table that the tensor's device can use;
Triton's interpreter is never taken by itself.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from hiedit import extension
from hiedit.ledger.update import Update

BACKENDS = ("auto", "triton", "cuda", "cpp", "reference")
_DTYPES = {"bf16": 0, "fp16": 1, "fp32": 2, None: -1}  # as csrc/commit.h numbers them


def choose(backend: str | None, target: Tensor) -> str:
    """The backend for a tensor: the one asked for, else ``HIEDIT_BACKEND``, else what is there.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if the backend asked for cannot be used here, with the remedy.
    """
    backend = backend or os.environ.get("HIEDIT_BACKEND") or "auto"
    if backend not in BACKENDS:
        raise ValueError(f"backend (or HIEDIT_BACKEND) is {backend!r}: choose one of {BACKENDS}")
    if backend == "auto":
        order = ("triton", "cuda") if target.is_cuda else ("cpp",)
        return next((name for name in order if not problem(name, target)), "reference")
    if reason := problem(backend, target):
        raise RuntimeError(
            f"backend {backend!r} {reason}; or use backend 'auto' or 'reference' "
            "(same bits, perhaps slower)"
        )
    return backend


def problem(backend: str, target: Tensor) -> str | None:
    """Return why ``backend`` cannot work on a tensor, with the remedy; None where it can."""
    find = {"triton": _triton_problem, "cuda": _cuda_problem, "cpp": _cpp_problem}
    return find[backend](target) if backend in find else None


def launch(
    backend: str,
    updates: Sequence[Update],
    mask: Tensor | None = None,
    *,
    start: int,
    end: int,
    conv1d: bool = False,
) -> None:
    """One launch of ``triton`` or ``cuda`` for checked updates of one shape; see ``Update``."""
    first = updates[0]
    if first.A is None:
        columns = 4096  # rounding alone: any cut of the flat range into rows will do
    else:
        columns = first.B.shape[0] if conv1d else first.A.shape[1]
    options = {"start": start, "end": end, "conv1d": conv1d}
    if backend == "triton":
        _kernels()[0].commit(updates, columns, **options, mask=mask)
        return
    table = importlib.import_module("hiedit_kernels.table").Table.of(updates, **options)
    types = _DTYPES[table.weight], _DTYPES[table.factor]
    mask = None if mask is None else mask.bool()
    torch.ops.hiedit.commit_table_(
        table.on(first.acc.device), mask, columns, start, end, conv1d, *types
    )


@functools.cache
def _kernels() -> tuple[ModuleType | None, str | None]:
    """(hiedit_kernels.commit, None) or (None, why it cannot be imported)."""
    try:
        return importlib.import_module("hiedit_kernels.commit"), None
    except ImportError as error:
        return None, f"needs Triton kernels, and they do not import ({error})"


def _triton_problem(target: Tensor) -> str | None:
    kernels, reason = _kernels()
    if kernels is None:
        return f'{reason}: pip install "hiedit[triton]"'
    if target.is_cuda and kernels.INTERPRETED:
        return "was imported for Triton's interpreter, which has no GPU: unset TRITON_INTERPRET"
    if target.device.type not in ("cpu", "cuda"):
        return f"works on GPUs and the tensor is on {target.device}"
    if target.is_cuda:
        return None
    if not kernels.INTERPRETED:
        return (
            "works on GPUs and the tensor is on the CPU: set TRITON_INTERPRET=1 before the start "
            "of the process to interpret it there (slow, for tests)"
        )
    if not kernels.rounds_once():
        return (
            "on the CPU needs an interpreter whose fma rounds once, and this Triton's rounds "
            "twice: pip install 'triton>=3.9'"
        )
    return None


def _cuda_problem(target: Tensor) -> str | None:
    if not target.is_cuda:
        return f"works on GPUs and the tensor is on {target.device}: move it to one"
    built = extension.load()
    if not built.available:
        return f"needs the compiled extension, but {built.reason}; {extension.REMEDY}"
    if not hasattr(torch.ops.hiedit, "commit_table_"):
        return (
            "needs CUDA in the compiled extension, which was built without: put nvcc on PATH and "
            "run `pip install --no-build-isolation -e .` with a CUDA build of PyTorch"
        )
    return None


def _cpp_problem(target: Tensor) -> str | None:
    built = extension.load()
    if not built.available:
        return f"needs the compiled extension, but {built.reason}; {extension.REMEDY}"
    if target.device.type != "cpu":
        return f"works on the CPU and the tensor is on {target.device}"
    return None
