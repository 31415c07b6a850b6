"""Files that are there whole or not at all, and that a power cut does not take back."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


def sync(path: Path) -> None:
    """Have the disk hold ``path``: the contents of a file, or the renames and removals in a
    directory (which can be opened on POSIX systems alone)."""
    directory = path.is_dir()
    if directory and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if directory else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write a file to. When the block ends well, the file is on the
    disk and takes the place of ``path`` in one rename, readable to whom the umask says; otherwise
    it is removed and ``path`` is as it was. Missing directories are made.

    Raises:
        OSError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode  # safetensors makes files that only their owner may read
    try:
        yield temporary
        temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> Path:
    """Put ``text`` at ``path`` in UTF-8, whole or not at all; see ``replacing``."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
