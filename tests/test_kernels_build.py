"""The GPU kernels where there is no GPU: they compile, and the dispatch says what it needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_here import triton_environment  # noqa: F401

import hiedit.ledger.accumulate
from hiedit.ledger import dispatch

CSRC = Path(__file__).resolve().parents[1] / "csrc"
NVCC = shutil.which("nvcc")


def test_choice_of_a_gpu_backend(monkeypatch):
    on_cpu = torch.zeros(2, 3)
    arguments = on_cpu, torch.ones(1, 3), torch.ones(2, 1)
    accumulate_ = hiedit.ledger.accumulate.accumulate_
    with pytest.raises(RuntimeError, match="'cuda' works on GPUs and the tensor is on cpu"):
        accumulate_(*arguments, backend="cuda")
    kernels = dispatch._kernels()[0]
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setenv("HIEDIT_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="'triton' works on GPUs.*set TRITON_INTERPRET=1"):
        accumulate_(*arguments)
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    monkeypatch.setattr(kernels, "rounds_once", lambda: False)
    with pytest.raises(RuntimeError, match="rounds twice: pip install 'triton>=3.9'"):
        accumulate_(*arguments)
    missing = None, "needs Triton kernels, and they do not import (No module named 'triton')"
    monkeypatch.setattr(dispatch, "_kernels", lambda: missing)
    with pytest.raises(RuntimeError, match=r'No module named.*pip install "hiedit\[triton\]"'):
        accumulate_(*arguments)
    assert not on_cpu.any()
    assert dispatch.choose("auto", on_cpu) in ("cpp", "reference")


COMPILE = """
import re, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hiedit_kernels.commit import _Choice, _commit
choice = _Choice(True, False, True, "bf16", "fp32", True, False)
names, warps = _commit.arg_names, 4
constants = {**choice.constants(), "BR": 8, "BC": 256, "UNROLL": 4}
types = dict.fromkeys(names, "constexpr") | {"table": "*i64", "mask": "*i8"}
types |= dict.fromkeys(("R", "C", "first_row"), "i32") | {"start": "i64", "end": "i64"}
sixteen = {(names.index(n),): [["tt.divisibility", 16]] for n in ("table", "C", "start", "end")}
options = {"num_warps": warps, "enable_fp_fusion": False}
source = ASTSource(_commit, types, constants, sixteen)
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
fused = re.findall(r"fma[.]\\S+", ptx)
assert fused == ["fma.rn.f32"] * (8 * 256 * 4 // (32 * warps)), fused
assert not re.search(r"[.]ftz|[.]approx|mma", ptx)
wide = len(re.findall(r"(?:ld|st)[.]global[.]v4[.]b32", ptx))
assert wide == 2 * 4 + 2 * 2, wide  # 16 elements a thread: acc and weights, in and out
"""


def test_triton_compiles_to_fused_and_unflushed_arithmetic(tmp_path):
    """For a GPU that need not be here: each rank row one fma.rn.f32 per element, nothing else."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True,
                          timeout=120, env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")
def test_nvcc_compiles_the_kernel(tmp_path):
    """Alone, without PyTorch's headers."""
    ptx = tmp_path / "commit.ptx"
    command = [NVCC, "-std=c++20", "-O3", "--fmad=false", "-arch=sm_90", "-Werror",
               "all-warnings", "--ptx", CSRC / "commit.cu", "-o", ptx]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    text = ptx.read_text()
    assert "fma.rn.f32" in text and ".ftz" not in text
