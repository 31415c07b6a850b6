"""`hiedit doctor` names what is wrong, says what to do, and never dies of what it looks at."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys

import pytest

from hiedit import doctor, extension


def by_name(checks):
    return {check.name: check for check in checks}


@pytest.fixture
def checks():
    return by_name(doctor.report())


def test_a_working_installation(checks):
    core = [check for check in checks.values() if check.core]
    assert {check.name for check in core} == {
        "python", "torch", "transformers", "safetensors", "numpy"
    }  # fmt: skip
    assert all(check.status == "ok" and check.found for check in core)
    assert doctor.exit_status(list(checks.values())) == 0


def test_every_part_is_looked_at(checks):
    assert set(doctor.OPTIONAL) < set(checks)
    others = (
        "compiled extension",
        "C++ compiler",
        "ninja",
        "triton",
        "embedded world",
        "real model",
    )
    assert {*others, "threads", "memory", "disk"} < set(checks)
    for check in checks.values():
        assert check.status in ("ok", "missing", "broken") and check.found
        assert check.remedy or check.status == "ok" or check.name == "triton"


def test_the_extension_is_built_where_a_compiler_is():
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler here")
    assert extension.load().available, extension.load().reason


def test_a_missing_package_has_a_remedy(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    found = by_name(doctor.report())
    for name, (extra, purpose) in doctor.OPTIONAL.items():
        assert found[name].status == "missing" and purpose in found[name].found
        assert f"hiedit[{extra}]" in found[name].remedy
    assert doctor.exit_status(list(found.values())) == 0  # the core imports without them


def test_a_wrong_version_is_broken(monkeypatch):
    monkeypatch.setattr(
        importlib.metadata,
        "requires",
        lambda name: ["torch<2.0", "numpy>=1", 'typer>=99,<100; extra == "cli"'],
    )
    checks = doctor.report()
    found = by_name(checks)
    assert found["torch"].status == "broken" and "<2.0" in found["torch"].remedy
    assert found["numpy"].status == "ok"
    if found["typer"].status != "missing":
        assert found["typer"].status == "broken" and "typer<100,>=99" in found["typer"].remedy
    assert doctor.exit_status(checks) == 1


def test_a_check_that_fails_is_reported_and_the_others_go_on(monkeypatch):
    def explode():
        raise OSError("disk on fire")

    monkeypatch.setattr(doctor, "_disk", explode)
    monkeypatch.setattr(doctor, "_torch", explode)
    checks = doctor.report()
    found = by_name(checks)
    assert found["disk"].status == found["torch"].status == "broken"
    assert "disk on fire" in found["disk"].found
    assert found["memory"].status == "ok"
    assert doctor.exit_status(checks) == 1


def test_an_extension_that_was_not_built(monkeypatch):
    lost = extension.Extension(None, "it was not built (no compiler)")
    monkeypatch.setattr(extension, "load", lambda: lost)
    check = doctor._extension()
    assert check.status == "missing" and "no compiler" in check.found
    assert "pip install" in check.remedy and not check.core
    stale = extension.Extension("/x/_C.so", "/x/_C.so does not load: undefined symbol")
    monkeypatch.setattr(extension, "load", lambda: stale)
    assert doctor._extension().status == "broken"


@pytest.mark.parametrize("rich", [True, False], ids=["rich", "plain"])
@pytest.mark.parametrize("problems", [True, False], ids=["problems", "all"])
def test_printing(rich, problems, monkeypatch, capsys):
    shown = [
        doctor.Check("torch", "ok", "2.99", core=True),
        doctor.Check("ray", "missing", "not installed", 'pip install "hiedit[ray]"'),
    ]
    monkeypatch.setattr(doctor, "report", lambda: shown)
    if rich:
        pytest.importorskip("rich", reason="rich is not installed")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        monkeypatch.setenv("COLUMNS", "120")
    else:
        monkeypatch.setitem(sys.modules, "rich", None)
        monkeypatch.setitem(sys.modules, "rich.console", None)
    assert doctor.print_report(problems) == 0
    out = capsys.readouterr().out
    assert "ray" in out and "hiedit[ray]" in out
    assert ("2.99" in out) is not problems


def test_as_a_module():
    command = [sys.executable, "-m", "hiedit.doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "compiled extension" in done.stdout and "python" in done.stdout
