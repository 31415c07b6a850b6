"""Builds `hiedit._C` where PyTorch and a C++ compiler are, and installs without it elsewhere.

Metadata and dependencies are in pyproject.toml. Install with `--no-build-isolation`: the extension
must be built against the PyTorch that will load it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError:
    BuildExtension = None

# No contraction: a fused multiply-add happens where the source says so and nowhere else, or the
# bits would depend on the compiler. Nobody reads the exception flags, so selects may vectorise.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-trapping-math", "-fvisibility=hidden", "-g0"]
# The same on a GPU; -O3 and subnormals kept are nvcc's defaults, rounding is by intrinsics.
NVCC_FLAGS = ["-O3", "-std=c++20", "--fmad=false"]
CUDA_SOURCES = ["csrc/commit_cuda.cpp", "csrc/commit.cu"]
# pip hides what a build prints, so the reason of a failure is left where `hiedit doctor` looks.
REASON = Path("build/extension-error.txt")


def warn(reason: object) -> None:
    REASON.parent.mkdir(exist_ok=True)
    REASON.write_text(f"{reason}\n")
    print(
        f"\nwarning: hiedit._C was not built: {reason}\n"
        "warning: HiEdit works without it, more slowly; `hiedit doctor` says what to do.\n",
        file=sys.stderr,
    )


def has_cuda() -> bool:
    """Whether PyTorch is a CUDA build and its compiler is there. No GPU is needed to build."""
    if torch.version.cuda is None or CUDA_HOME is None:
        return False
    return shutil.which("nvcc", path=str(Path(CUDA_HOME) / "bin")) is not None


def extension(cuda: bool):
    flags = list(FLAGS)
    if sys.platform.startswith("linux"):
        # Compiled with OpenMP but not linked to it: at::parallel_for must run on the very runtime
        # that libtorch brings, and a second one in the process would have threads of its own.
        flags.append("-fopenmp")
    sources, kind = ["csrc/ops.cpp", "csrc/kernels.cpp", "csrc/layers.cpp"], CppExtension
    if cuda:
        sources, kind = [*sources, *CUDA_SOURCES], CUDAExtension
    return kind(
        "hiedit._C",
        sources,
        depends=["csrc/kernels.h", "csrc/kernels.inl", "csrc/layers.h", "csrc/commit.h"],
        extra_compile_args={"cxx": flags, "nvcc": NVCC_FLAGS},
        optional=True,  # a missing file is no error when setuptools copies the results
    )


def commands():
    """`build_ext` that reports a failure and lets the installation go on."""

    class Build(BuildExtension):
        def build_extensions(self):
            REASON.unlink(missing_ok=True)
            try:
                self.build_with_or_without_cuda()
            except (Exception, SystemExit) as error:
                # The library of an earlier build would not match today's sources.
                Path(self.get_ext_filename("hiedit._C")).unlink(missing_ok=True)
                warn(f"{error}; `pip install -v` shows the compiler's own words")

        def build_with_or_without_cuda(self):
            try:
                super().build_extensions()
            except (Exception, SystemExit) as error:
                # For instance an nvcc of another version than PyTorch's: the CPU part needs none.
                built, plain = self.extensions[0], extension(cuda=False)
                if len(built.sources) == len(plain.sources):
                    raise
                print(f"warning: building hiedit._C without CUDA: {error}", file=sys.stderr)
                for name in ("sources", "libraries", "library_dirs", "extra_compile_args"):
                    setattr(built, name, getattr(plain, name))
                super().build_extensions()

    return {"build_ext": Build}


compiled = {}
if BuildExtension is None:
    warn("PyTorch is not installed in this environment (use --no-build-isolation)")
else:
    compiled = {"ext_modules": [extension(has_cuda())], "cmdclass": commands()}

# `kernels` and `configs` keep their short names in the repository and get safe ones when installed:
# a top-level package `kernels` would shadow Hugging Face's.
setup(
    packages=[*find_packages(include=["hiedit", "hiedit.*"]), "hiedit_kernels", "hiedit_configs"],
    package_dir={"hiedit_kernels": "kernels", "hiedit_configs": "configs"},
    **compiled,
)
