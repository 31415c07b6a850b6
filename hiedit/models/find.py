"""Finding the directory of a model by what a user calls it."""

from __future__ import annotations

from pathlib import Path

from hiedit.models.cache import Tell, about, locked, models_dir, note, sha256
from hiedit.models.convert import check, convert
from hiedit.models.registry import KNOWN, Known, is_here, place

SUFFIX = ".gguf"


def resolve(path: str, tell: Tell = note) -> str:
    """The directory of a model, or what was given where it is none of ours (a hub name, a
    directory): a name of ``KNOWN`` is looked up, a GGUF file converted into the cache, once.

    Raises:
        ValueError: for a known model that is not here, or a file that is none or no model.
        ImportError: if a package is missing, with the command that installs it.
    """
    if path in KNOWN:
        return str(_known(KNOWN[path]))
    given = Path(path).expanduser()
    if given.is_dir():
        inside = sorted(p.name for p in given.glob(f"*{SUFFIX}"))
        if inside and not (given / "config.json").exists():
            raise ValueError(
                f"model {path!r}: the directory holds {', '.join(inside)} and no config.json: "
                f"give the file, {given / inside[0]}"
            )
        return path
    return str(_converted(given, tell)) if given.suffix.lower() == SUFFIX else path


def _known(model: Known) -> Path:
    if not is_here(model):
        raise ValueError(f"model {model.name!r} is not here: run `hiedit models get {model.name}`")
    return place(model)


def _converted(gguf: Path, tell: Tell) -> Path:
    if not gguf.is_file():
        raise ValueError(f"model {str(gguf)!r}: there is no such file")
    digest = sha256(gguf)
    for model in KNOWN.values():  # a file that is one of the known models is that model
        if model.sha256 == digest and is_here(model):
            return place(model)
    target = models_dir() / f"gguf-{digest[:16]}"
    if about(target):
        return target
    check(gguf)
    with locked(target, tell):
        if about(target):
            return target
        return convert(gguf, target, {"sha256": digest, "source": str(gguf.resolve())}, tell)


def converted() -> dict[Path, dict]:
    """Return what was converted from files, by directory: what its hiedit.json says."""
    found = {path: about(path) for path in sorted(models_dir().glob("gguf-*"))}
    return {path: said for path, said in found.items() if said}
