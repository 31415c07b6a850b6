"""The shape of the tree: which way imports may point, what the core needs, what is banned."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hiedit"

# Data flows down this list, so imports point up it: a room may import the rooms of earlier lines
# and itself, and no other. Every room is listed, so there are no circles.
CORE_LAYERS = [
    {"checks", "hub", "parallel"},
    {"updaterconfig"},
    {"types", "progress", "config", "durable", "extension", "provenance"},
    {"catalogue", "data", "limits", "world"},
    {"backbone", "models"},
    {"policy", "updaters", "ledger"},
    {"knowledge", "rl"},
    {"evaluation", "calibration", "watch"},
    {"methods", "plots", "runconfig", "tracking"},
]
LAYERS = [
    *CORE_LAYERS,
    {"compose", "doctor", "guard", "remember"},
    {"demo", "edited", "experiment"},
    {"calibrating", "compare", "known", "plan", "replayed"},
    {"editor", "run"},
    {"sharded"},
    {"distributed"},
    {"cli"},
]
RANK = {room: rank for rank, layer in enumerate(LAYERS) for room in layer}
CORE_ROOMS = {room for layer in CORE_LAYERS for room in layer}

# `import hiedit` and the rooms up to the evaluation work where only these are installed (tokenizers
# and yaml come with transformers). Anything else is imported inside the function that needs it.
CORE = {"torch", "transformers", "safetensors", "numpy", "tokenizers", "yaml", "hiedit"}
OPTIONAL = ("datasets", "hydra", "omegaconf", "typer", "rich", "mlflow", "ray", "deepspeed", "peft",
            "matplotlib", "scipy", "pandas", "sklearn", "gguf")  # fmt: skip
# The only rooms that may import these, lazily or not.
OWNERS = {"mlflow": {"tracking"}, "ray": {"distributed"}, "typer": {"cli"},
          "deepspeed": {"sharded"}, "gguf": {"models"}}  # fmt: skip

UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MAX_LINES = 400
SOURCES = sorted(
    path
    for folder in ("hiedit", "kernels", "launch", "benchmarks", "tests", "csrc")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".cpp", ".h", ".inl", ".cu", ".sh"}
)
PYTHON = [*(path for path in SOURCES if path.suffix == ".py"), ROOT / "setup.py"]
MODULES = [path for path in PYTHON if PACKAGE in path.parents]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room_of(path: Path) -> str:
    """The first part below `hiedit/`; empty for `hiedit/__init__.py`, which exports lazily."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path, top_level: bool = False) -> Iterator[str]:
    """Dotted names that a file imports, relative ones resolved; only at its top level if asked."""
    tree = parsed(path)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if top_level and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def test_imports_follow_the_flow_of_data():
    wrong = []
    for path in MODULES:
        room = room_of(path)
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "hiedit" or len(parts) < 2 or not room:
                continue
            target = parts[1]
            exists = (PACKAGE / target).is_dir() or (PACKAGE / f"{target}.py").exists()
            if not exists or target == room:
                continue
            if RANK[target] >= RANK[room]:
                wrong.append(f"{name_of(path)} imports {name}, which comes later or beside it")
    assert not wrong, "\n".join(wrong)


def test_every_room_has_its_layer():
    assert {room_of(path) for path in MODULES} - {""} == set(RANK)


def test_docstrings_begin_with_a_noun_or_a_verb():
    """Not with a clause: who reads the first word knows what the thing is, or what it does."""
    clauses = set(
        "what whether where when how by of why who which as in at if with inside for to on from so "
        "after before until while behind beside between without".split()
    )
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    wrong = [
        f"{name_of(path)}: {text.splitlines()[0]}"
        for path in MODULES
        for node in ast.walk(parsed(path))
        if isinstance(node, kinds) and (text := ast.get_docstring(node))
        if re.split(r"[\s,:]", text)[0].lower() in clauses
    ]
    assert not wrong, "\n".join(wrong)


def test_rooms_of_the_core_need_the_core_only():
    wrong = [
        f"{name_of(path)} imports {name} at its top level"
        for path in MODULES
        if room_of(path) in CORE_ROOMS or not room_of(path)
        for name in imports(path, top_level=True)
        if name.split(".")[0] not in CORE | set(sys.stdlib_module_names)
    ]
    assert not wrong, "\n".join(wrong)


def test_packages_of_one_path_are_imported_by_that_path():
    wrong = [
        f"{name_of(path)} imports {name}; only {sorted(OWNERS[package])} may"
        for path in MODULES
        for name in imports(path)
        if (package := name.split(".")[0]) in OWNERS and room_of(path) not in OWNERS[package]
    ]
    assert not wrong, "\n".join(wrong)


def test_the_core_imports_with_torch_and_transformers_alone():
    """In a process where the optional packages cannot be imported, as if never installed."""
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in MODULES
        if room_of(path) in CORE_ROOMS or not room_of(path)
    )
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"
        f"for name in {['hiedit', *modules]!r}:\n"
        "    importlib.import_module(name)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def unsafe(path: Path) -> Iterator[str]:
    """Ways to run code from a file that someone else wrote."""
    for name in imports(path):
        if name.split(".")[0] in UNSAFE:
            yield f"imports {name}"
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg}
        if called == "torch.load" and given.get("weights_only") != "True":
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if given.get("trust_remote_code") == "True":
            yield f"line {node.lineno}: trust_remote_code=True"
        if given.get("allow_pickle") == "True":
            yield f"line {node.lineno}: allow_pickle=True"


def test_nothing_unpickles_or_trusts_remote_code():
    wrong = [f"{name_of(path)}: {reason}" for path in PYTHON for reason in unsafe(path)]
    assert not wrong, "\n".join(wrong)


def test_files_stay_readable():
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in SOURCES}
    long = {name: lines for name, lines in lengths.items() if lines > MAX_LINES}
    assert not long, f"longer than {MAX_LINES} lines: {long}"


def test_hugging_faces_kernels_is_not_shadowed():
    wrong = [name_of(p) for p in PYTHON if any(n.split(".")[0] == "kernels" for n in imports(p))]
    assert not wrong, f"{wrong} import `kernels`; ours is called hiedit_kernels"


def test_installed_names():
    """`kernels/` and `configs/` are found in a checkout and after an installation."""
    for name, suffix in (("hiedit_kernels", ".py"), ("hiedit_configs", ".yaml")):
        package = pytest.importorskip(name, reason="hiedit is not installed")
        # The first entry; an editable installation appends a hook that is no directory.
        assert any(Path(next(iter(package.__path__))).rglob(f"*{suffix}")), name
