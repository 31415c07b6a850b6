"""Builds that DeepSpeed starts at first use, and one that was killed.

PyTorch guards a build with a file that it removes at the end. Where the process that built was
killed, the file stays, and every later start waits for it without a word.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

STALE = 600.0  # seconds; a build takes about 45, on a busy machine several times that


def find_ninja() -> None:
    """Let the ninja of this interpreter's environment be found first, also where that was not
    activated: another version starts every build over (45 s or more)."""
    beside = Path(sys.executable).parent
    if (beside / "ninja").is_file() and shutil.which("ninja") != str(beside / "ninja"):
        os.environ["PATH"] = f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"


def check_builds(operators: Iterable[str] | None = None, stale: float = STALE) -> None:
    """Raises ValueError, naming the file, where a build left its lock more than ``stale`` seconds
    ago and no process is at it. operators: names; None: all that DeepSpeed has."""
    if operators is None:
        import deepspeed

        operators = deepspeed.ops.__compatible_ops__
    for lock in locks(operators):
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:  # it ended this moment
            continue
        if age > stale and not building(lock.parent):
            raise ValueError(
                f"{lock} was left {age / 60:.0f} minutes ago by a build that was killed, and every "
                "start of DeepSpeed waits for it: delete the file and start again"
            )


def locks(operators: Iterable[str]) -> list[Path]:
    """The locks of ``operators`` that are there."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        places = [Path(given)]
    else:
        from torch.utils.cpp_extension import get_default_build_root

        python = f"py{sys.version_info.major}{sys.version_info.minor}*_*"
        places = list(Path(get_default_build_root()).glob(python))
    found = (place / name / "lock" for place in places for name in operators)
    return [lock for lock in found if lock.is_file()]


def building(directory: Path) -> bool:
    """Tell whether a compiler is at work in ``directory``; unknown, so False, where there is no
    /proc or the process is somebody else's."""
    for process in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if process.readlink() == directory.resolve():
                return True
        except OSError:
            continue
    return False
