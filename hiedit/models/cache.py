"""The cache of converted models: a directory gets there whole or not at all.

CACHE/models/NAME          a Hugging Face directory and hiedit.json, which says where it is from
CACHE/models/.NAME-*       one that is being made; what a killed process leaves counts as nothing
CACHE/hashes.json          SHA-256 of GGUF files that were seen, so that none is read twice
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hiedit.durable import sync

ABOUT = "hiedit.json"
Tell = Callable[[str], None]


def note(text: str) -> None:
    """Says on standard error what takes a while."""
    print(text, file=sys.stderr, flush=True)


def cache_dir() -> Path:
    """``$HIEDIT_CACHE``, else ``hiedit`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; need not exist."""
    if named := os.environ.get("HIEDIT_CACHE"):
        return Path(named).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hiedit"


def models_dir() -> Path:
    """Return where the converted models are; need not exist."""
    return cache_dir() / "models"


def about(directory: Path) -> dict[str, Any] | None:
    """Return what hiedit.json in ``directory`` says; None where no whole model is there: without
    that file, or with a file of another size than was written."""
    try:
        said = json.loads((directory / ABOUT).read_text(encoding="utf-8"))
        sizes = {name: (directory / name).stat().st_size for name in said["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return said if sizes == said["files"] else None


@contextlib.contextmanager
def made(target: Path) -> Iterator[Path]:
    """Yield an empty directory beside ``target``; when the block ends well, its contents are on
    the disk and it takes the place of ``target`` in one rename. Otherwise it is removed.

    To be called under ``locked(target)``: what a killed process left there is removed first.
    """
    remove_leftovers(target)
    making = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield making
        for path in making.iterdir():
            path.chmod(0o644)
            sync(path)
        making.chmod(0o755)
        sync(making)
        if target.exists():
            target.rename(making.with_name(f"{making.name}-old"))
        making.rename(target)
        sync(target.parent)
    finally:
        remove_leftovers(target)


def remove_leftovers(target: Path) -> None:
    """Removes what was being made, or was replaced, beside ``target``."""
    for path in target.parent.glob(f".{target.name}-*"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def locked(target: Path, tell: Tell = note) -> Iterator[None]:
    """One process at a time makes ``target``; the others wait, and find it there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "w") as held:
        try:
            import fcntl
        except ImportError:  # not POSIX: two at once make it twice, and the last one stays
            yield
            return
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f"waiting for another process that makes {target}")
            fcntl.flock(held, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield


def enough_space(directory: Path, needed: int) -> None:
    """Raises ValueError where the disk of ``directory`` has fewer than ``needed`` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ValueError(
            f"{directory} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed: make "
            "room, or set HIEDIT_CACHE to a directory on another disk"
        )


def sha256(path: Path) -> str:
    """SHA-256 of a file in hex; of a file that was hashed before and has not changed since (size,
    time of change, place on the disk), from the cache."""
    path = path.resolve()
    stat = path.stat()
    seen = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    hashes = _hashes()
    if (stored := hashes.get(str(path))) and stored[:-1] == seen:
        return stored[-1]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _write_hashes(hashes | {str(path): [*seen, digest]})
    return digest


def _hashes() -> dict[str, list]:
    try:
        stored = json.loads((cache_dir() / "hashes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in stored.items() if isinstance(v, list)}


def _write_hashes(hashes: dict[str, list]) -> None:
    """Only saves time, so a disk that cannot be written to is no failure."""
    with contextlib.suppress(OSError):
        cache_dir().mkdir(parents=True, exist_ok=True)
        temporary = cache_dir() / f".hashes-{os.getpid()}"
        temporary.write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")
        temporary.replace(cache_dir() / "hashes.json")
