"""Imports the Triton kernels as this machine can run them: on its GPU, else interpreted.

Triton decides when it reads a kernel, by an environment variable that must not leak into what else
runs in this process: hence the import in here, and the fixture.
"""

from __future__ import annotations

import importlib
import os
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason='Triton is not installed: pip install -e ".[triton]"')

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU, and torch sees none")
# On a GPU the variable is taken away rather than left as it is.
ENVIRONMENT = {} if ON_GPU else {"TRITON_INTERPRET": "1"}

with mock.patch.dict(os.environ, ENVIRONMENT):
    if ON_GPU:
        os.environ.pop("TRITON_INTERPRET", None)
    from hiedit_kernels import commit, reference, shift  # noqa: F401

    for module in (commit, shift):
        if module.INTERPRETED == ON_GPU:  # something imported it for another device
            importlib.reload(module)


@pytest.fixture(autouse=True)
def triton_environment(monkeypatch):
    """Triton's interpreter looks at its variable again while it runs."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
