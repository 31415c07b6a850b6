"""Whole directories, written beside their place and renamed into it: all of an export or none."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hiedit.durable import sync

REPORT = "hiedit_export.json"
FORMAT = 1


def check_target(directory: Path, overwrite: bool) -> None:
    """Tell whether ``directory`` may be made or replaced; to be called before expensive work.

    It may if it does not exist, is empty, or holds the files of an earlier export and no other.
    ``overwrite`` allows any plain files, but never a directory inside: exports have none, so that
    a home directory given by mistake is safe.

    Raises:
        ValueError: if not, naming what stands in the way.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; an export needs a directory")
    if not directory.is_dir():
        return
    found = {path.name for path in directory.iterdir()}
    inner = sorted(path.name for path in directory.iterdir() if path.is_dir())
    if inner:
        raise ValueError(
            f"{directory} holds the directory {inner[0]!r}, which no export does; "
            "give another directory"
        )
    foreign = sorted(found - _written_before(directory))
    if foreign and not overwrite:
        raise ValueError(
            f"{directory} holds {foreign[0]!r} ({len(foreign)} of {len(found)} files are no part "
            "of an earlier export); give an empty or a new directory, or overwrite=True"
        )


@contextlib.contextmanager
def replacing(directory: Path, report: dict[str, Any], overwrite: bool) -> Iterator[Path]:
    """Yields an empty directory beside ``directory``; on a clean exit it takes its place.

    ``report`` is written into it last, with the names of the files, by which a later export knows
    what it may replace; values may still be added to it inside. After an error nothing is left and
    an earlier export is as it was. Everything is on disk before the rename. Between the two
    renames of a replacement there is a moment without the directory: a process killed in it leaves
    the old one beside its place, under a name that ends in ``.old``.
    """
    place = directory.resolve()  # of a link, what it points to is replaced
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        _finish(temporary, report)
        check_target(directory, overwrite)  # again: the work in between may have taken long
        _swap(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _written_before(directory: Path) -> set[str]:
    try:
        report = json.loads((directory / REPORT).read_text(encoding="utf-8"))
        return {REPORT, *report["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _finish(temporary: Path, report: dict[str, Any]) -> None:
    """Adds the report, gives all files its permissions, and waits for the disk.

    safetensors makes files that only their owner may read, whatever the umask says.
    """
    files = sorted(path.name for path in temporary.iterdir())
    write_json(temporary / REPORT, {"format": FORMAT, **report, "files": files})
    mode = stat.S_IMODE((temporary / REPORT).stat().st_mode)
    for path in temporary.iterdir():
        path.chmod(mode)
        sync(path)
    sync(temporary)


def _swap(temporary: Path, place: Path) -> None:
    old = temporary.with_suffix(".old")
    if place.exists():
        os.rename(place, old)
    try:
        os.rename(temporary, place)
    except OSError:
        if old.exists():
            os.rename(old, place)
        raise
    sync(place.parent)
    shutil.rmtree(old, ignore_errors=True)
