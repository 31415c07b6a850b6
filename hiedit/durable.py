"""What survives a power cut: everything here that renames a file into its place uses this."""

from __future__ import annotations

import os
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
