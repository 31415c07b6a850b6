"""`hiedit doctor`: what is installed, built and found, and what to do about what is missing.

Looks without importing wherever that suffices: an optional package that is broken, or takes seconds
to import, must not keep the doctor from reporting on the others. Needs nothing but the core.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PYTHON = ((3, 11), (3, 13))  # from, below

# Distributions of the extras, and what they are for.
OPTIONAL = {
    "datasets": ("cli", "loading edit records"),
    "hydra-core": ("cli", "configuration of runs"),
    "typer": ("cli", "the `hiedit` command"),
    "rich": ("cli", "tables and progress bars"),
    "matplotlib": ("cli", "plots"),
    "scipy": ("cli", "confidence intervals and tests"),
    "mlflow": ("mlflow", "tracking"),
    "gguf": ("models", "models from GGUF files"),
    "peft": ("peft", "loading exported adapters"),
    "ray": ("ray", "distributed training"),
    "deepspeed": ("deepspeed", "sharded training"),
}
MEMORY_GIB, DISK_GIB = 4, 2  # what the demo wants at hand


@dataclass(frozen=True)
class Check:
    """One line of the report.

    status: ``ok``; ``missing``, HiEdit works without it, less well or in part; ``broken``, it is
        there and does not work, or is of a version that HiEdit was not made for.
    found: what is there. remedy: what to do about it, empty where there is nothing to do.
    core: nothing works unless this is ok.
    """

    name: str
    status: Literal["ok", "missing", "broken"]
    found: str
    remedy: str = ""
    core: bool = False


def report() -> list[Check]:
    """All checks, in the order in which a user would repair them."""
    checks = [
        _guarded("python", _python, core=True),
        _guarded("torch", _torch, core=True),
        *(
            _guarded(name, lambda name=name: _imported(name), core=True)
            for name in ("transformers", "safetensors", "numpy")
        ),
        _guarded("compiled extension", _extension),
        _guarded("C++ compiler", _compiler),
        _guarded("ninja", _ninja),
        _guarded("triton", _triton),
        *(_guarded(name, lambda name=name: _optional(name)) for name in OPTIONAL),
        _guarded("embedded world", _world),
        _guarded("real model", _real_model),
        _guarded("threads", _threads),
        _guarded("memory", _memory),
        _guarded("disk", _disk),
    ]
    return checks


def exit_status(checks: list[Check]) -> int:
    """1 if anything of the core is not ok, else 0."""
    return int(any(check.core and check.status != "ok" for check in checks))


def print_report(problems: bool = False) -> int:
    """Prints the report, with Rich where it is installed, and returns the exit status.

    problems: only the lines that say what to do.
    """
    checks = report()
    shown = [check for check in checks if check.remedy] if problems else checks
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        _print_plain(shown)
    else:
        # Into a file or a pipe, a table squeezed to 80 columns would break paths and commands.
        if sys.stdout.isatty():
            _print_table(shown, Console(), Table)
        else:
            _print_plain(shown)
    return exit_status(checks)


def main() -> int:
    """``python -m hiedit.doctor [--problems]``, for where the command line is not installed."""
    return print_report(problems="--problems" in sys.argv[1:])


def _print_plain(checks: list[Check]) -> None:
    width = max((len(check.name) for check in checks), default=0)
    for check in checks:
        print(f"{check.status:7}  {check.name:{width}}  {check.found}")
        if check.remedy:
            print(f"{'':7}  {'':{width}}  -> {check.remedy}")


def _print_table(checks: list[Check], console, table_class) -> None:
    colours = {"ok": "green", "missing": "yellow", "broken": "red"}
    table = table_class("status", "what", "found", "what to do", box=None, pad_edge=False)
    for check in checks:
        status = f"[{colours[check.status]}]{check.status}[/]"
        # Brackets in "hiedit[ray]" would be read as markup.
        found, remedy = (text.replace("[", r"\[") for text in (check.found, check.remedy))
        table.add_row(status, check.name, found, remedy)
    console.print(table)


def _guarded(name: str, check: Callable[[], Check], core: bool = False) -> Check:
    """A doctor that dies of the disease helps nobody."""
    try:
        return check()
    except Exception as error:
        return Check(name, "broken", f"{type(error).__name__}: {error}", "see the error", core)


def _install(extra: str) -> str:
    return f'pip install "hiedit[{extra}]", in a checkout pip install -e ".[{extra}]"'


def _python() -> Check:
    low, high = PYTHON
    found = f"{platform.python_version()} ({sys.executable})"
    if low <= sys.version_info[:2] < high:
        return Check("python", "ok", found, core=True)
    wanted = f"Python {low[0]}.{low[1]} to {high[0]}.{high[1] - 1}"
    return Check("python", "broken", found, f"use {wanted}", core=True)


def _torch() -> Check:
    check = _imported("torch")
    if check.status != "ok":
        return check
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return Check("torch", "ok", f"{check.found}, CUDA {torch.version.cuda}, {name}", core=True)
    if torch.version.cuda:
        return Check("torch", "ok", f"{check.found}, a CUDA build, but no usable GPU", core=True)
    remedy = "install a CUDA build of torch to use the GPU" if shutil.which("nvidia-smi") else ""
    return Check("torch", "ok", f"{check.found}, CPU", remedy, core=True)


def _imported(name: str) -> Check:
    """A core package, which must really import and be of a version that HiEdit declares."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        there = importlib.util.find_spec(name) is not None
        status, remedy = ("broken" if there else "missing"), f"pip install {name}"
        return Check(name, status, str(error), remedy, core=True)
    version = getattr(module, "__version__", None) or importlib.metadata.version(name)
    return _ranged(Check(name, "ok", str(version), core=True), name, str(version))


def _optional(name: str) -> Check:
    """A package of an extra, found by its metadata and not imported."""
    extra, purpose = OPTIONAL[name]
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "missing", f"not installed ({purpose})", _install(extra))
    return _ranged(Check(name, "ok", version), name, version)


def _ranged(check: Check, name: str, version: str) -> Check:
    """``check``, or a broken one if HiEdit's own metadata asks for another version."""
    from packaging.requirements import Requirement

    try:
        declared = importlib.metadata.requires("hiedit") or []
    except importlib.metadata.PackageNotFoundError:
        return check  # run from a checkout that was never installed
    for line in declared:
        wanted = Requirement(line)
        if wanted.name == name and not wanted.specifier.contains(version, prereleases=True):
            found = f"{version}, not {wanted.specifier}"
            remedy = f'pip install "{name}{wanted.specifier}"'
            return Check(check.name, "broken", found, remedy, check.core)
    return check


def _extension() -> Check:
    from hiedit import extension

    built = extension.load()
    if built.available:
        return Check("compiled extension", "ok", f"hiedit._C ({extension.instruction_set()})")
    status = "broken" if built.path else "missing"
    found = f"{built.reason}; PyTorch does its work, more slowly"
    return Check("compiled extension", status, found, extension.REMEDY)


def _compiler() -> Check:
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if shutil.which(name):
            return Check("C++ compiler", "ok", _first_line(name, "--version"))
    remedy = "only to build the extension: install g++ or clang++"
    return Check("C++ compiler", "missing", "none of $CXX, c++, g++, clang++", remedy)


def _ninja() -> Check:
    # `pip install ninja` puts the program beside the interpreter, which need not be on PATH.
    path = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if path:
        return Check("ninja", "ok", _first_line(path, "--version"))
    found = "not installed (DeepSpeed, faster builds)"
    return Check("ninja", "missing", found, "pip install ninja")


def _triton() -> Check:
    import torch

    gpu = torch.cuda.is_available()
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        if gpu:
            return Check("triton", "missing", "not installed (GPU kernels)", "pip install triton")
        return Check("triton", "missing", "not installed (only GPU kernels need it)")
    return Check("triton", "ok", version if gpu else f"{version} (without a GPU: interpreted)")


def _world() -> Check:
    assets = Path(__file__).parent / "world" / "assets"
    files = sorted(assets.rglob("*")) if assets.is_dir() else []
    size = sum(path.stat().st_size for path in files if path.is_file())
    if any(path.suffix == ".safetensors" for path in files):
        return Check("embedded world", "ok", f"{size / 1e6:.1f} MB")
    return Check("embedded world", "missing", f"no model in {assets}", "hiedit world build")


def _real_model() -> Check:
    from hiedit.models.registry import KNOWN, is_here, place

    real = [model for model in KNOWN.values() if not model.embedded]
    for model in real:
        if is_here(model):
            return Check("real model", "ok", f"{model.name}, {place(model)}")
    names = ", ".join(model.name for model in real)
    remedy = f"hiedit models get {real[0].name}"
    return Check("real model", "missing", f"{names} is not here", remedy)


def _threads() -> Check:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Check("threads", "ok", f"{torch.get_num_threads()} in torch, {cores} cores usable")


def _memory() -> Check:
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page / 2**30
    free = os.sysconf("SC_AVPHYS_PAGES") * page / 2**30
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # counts what caches would give back, as SC_AVPHYS_PAGES does not
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) / 2**20
    remedy = "" if free >= MEMORY_GIB else f"the demo wants {MEMORY_GIB} GiB"
    return Check("memory", "ok", f"{free:.1f} GiB available of {total:.1f} GiB", remedy)


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    remedy = "" if free >= DISK_GIB else f"runs and tracking want {DISK_GIB} GiB"
    return Check("disk", "ok", f"{free:.1f} GiB free here", remedy)


def _first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    lines = (done.stdout or done.stderr).splitlines()
    if done.returncode != 0:
        raise RuntimeError(f"`{' '.join(command)}` failed: {lines[0] if lines else ''}")
    return lines[0]


if __name__ == "__main__":
    raise SystemExit(main())
