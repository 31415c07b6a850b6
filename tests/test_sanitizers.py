"""The C++ kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

`csrc/tests/driver.cpp` runs them without PyTorch and compares every bit with a plain loop.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).resolve().parents[1] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
SANITIZERS = {"address,undefined": ["-fno-sanitize-recover=all"], "thread": []}
HEADERS = Path(torch.__file__).parent / "include"  # c10/util/Half.h alone, which needs no library


def compiled(sources: list[Path], to: Path, sanitizer: str) -> subprocess.CompletedProcess:
    flags = ["-std=c++20", "-O1", "-g1", "-ffp-contract=off", "-fno-trapping-math", "-pthread"]
    command = [COMPILER, *flags, f"-fsanitize={sanitizer}", *SANITIZERS[sanitizer],
               f"-I{HEADERS}", *sources, "-o", to]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module", params=SANITIZERS)
def driver(request, tmp_path_factory):
    """The driver, compiled with a sanitizer that this machine has and can run."""
    if COMPILER is None:
        pytest.skip("no C++ compiler (set CXX)")
    folder = tmp_path_factory.mktemp("sanitizer")
    empty = folder / "empty.cpp"
    empty.write_text("int main() { return 0; }")
    probe = compiled([empty], folder / "empty", request.param)
    if probe.returncode != 0:
        last = probe.stderr.strip().splitlines()[-1]
        pytest.skip(f"{COMPILER} has no -fsanitize={request.param}: {last}")
    ran = subprocess.run([folder / "empty"], capture_output=True, text=True, timeout=60)
    if ran.returncode != 0:
        pytest.skip(f"-fsanitize={request.param} does not run here: {ran.stderr.strip()[:200]}")
    sources = [CSRC / "tests" / "driver.cpp", CSRC / "kernels.cpp"]
    built = compiled(sources, folder / "driver", request.param)
    assert built.returncode == 0, built.stderr
    return folder / "driver"


@pytest.mark.parametrize("simd", ["best", "generic"])
def test_the_kernels_are_clean_and_right(driver, simd):
    environment = {**os.environ, "HIEDIT_SIMD": simd}
    done = subprocess.run([driver], capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "241 cases" in done.stdout and not done.stderr
    assert simd == "best" or done.stdout.startswith("generic")
