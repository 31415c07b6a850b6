"""The state of a training run on disk, and a run that is asked to stop in an orderly way.

    <directory>/edits-00000300/   learner.safetensors + .json, worker-0.safetensors + .json, ...
                                  about.json, written last: what the run was, what it did

A checkpoint is written beside its final name and renamed, so there is a whole one or none.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hiedit.durable import sync

FORMAT = 1
LEARNER = "learner"


def worker_name(index: int) -> str:
    """The part of a checkpoint that holds the trajectory of worker ``index``."""
    return f"worker-{index}"


@dataclass(frozen=True)
class Snapshot:
    """The state of one part: tensors by name (on the CPU), and numbers and words as JSON."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any] = field(default_factory=dict)


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop by a signal and has written a checkpoint."""

    def __init__(self, number: int, message: str = "stopped"):
        super().__init__(number, message)
        self.number, self.message = number, message

    def __str__(self) -> str:
        return self.message


class Checkpoints:
    """The last ``keep`` checkpoints of one training run, one at least every ``every`` versions.

    identity: what the run is (JSON). A checkpoint of another run is not continued.
    resume: whether to continue where the newest one ended; without it, ``directory`` is emptied
    of old ones when the first is written.
    """

    def __init__(
        self,
        directory: str | Path,
        every: int = 100,
        keep: int = 2,
        identity: Mapping[str, Any] | None = None,
        resume: bool = False,
    ):
        self.directory, self.every, self.keep = Path(directory), every, keep
        self.identity = json.loads(json.dumps(identity or {}))
        self.resume, self._began = resume, resume

    def due(self, version: int) -> bool:
        """Tell whether ``version`` is one of those to write."""
        return version > 0 and version % self.every == 0

    def save(self, edits: int, parts: Mapping[str, Snapshot], about: Mapping[str, Any]) -> Path:
        """Write the state after ``edits`` training edits; older ones than the last ``keep`` go.

        Raises:
            OSError: if the directory cannot be written; the earlier checkpoints are untouched.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in self.directory.iterdir():  # what another run, or one that died, left behind
            if path.name.startswith(".") or not self._began:
                shutil.rmtree(path, ignore_errors=True)
        self._began = True
        final = self.directory / f"edits-{edits:08d}"
        temporary = self.directory / f".{final.name}.tmp"
        temporary.mkdir()
        for name, part in parts.items():
            tensors = {n: t.detach().cpu().contiguous().clone() for n, t in part.tensors.items()}
            save_file(tensors, temporary / f"{name}.safetensors")
            _write(temporary / f"{name}.json", part.values)
        identity = {"format": FORMAT, "identity": self.identity, "parts": list(parts)}
        _write(temporary / "about.json", {**identity, **about})
        for path in temporary.iterdir():
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync(self.directory)
        for old in self.paths()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def paths(self) -> list[Path]:
        """The whole checkpoints in the directory, oldest first."""
        return sorted(p.parent for p in self.directory.glob("edits-*/about.json"))

    def load(self) -> tuple[dict[str, Snapshot], dict[str, Any]] | None:
        """(parts, about) of the newest checkpoint; None without one, or where not to resume.

        Raises:
            ValueError: if it is damaged, or of a run with other settings, naming the first.
        """
        paths = self.paths() if self.resume else []
        if not paths:
            return None
        try:
            about = json.loads((paths[-1] / "about.json").read_text())
            self._check(paths[-1], about)
            parts = {name: _read(paths[-1], name) for name in about["parts"]}
        except (OSError, KeyError, SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(
                f"the checkpoint {paths[-1]} is damaged ({' '.join(str(error).split())}); remove "
                "it to continue from the one before"
            ) from None
        return parts, about

    def _check(self, path: Path, about: Mapping[str, Any]) -> None:
        if about["format"] != FORMAT:
            raise ValueError(f"{path} has format {about['format']!r}: this version reads {FORMAT}")
        for key in {**self.identity, **about["identity"]}:
            then, now = about["identity"].get(key), self.identity.get(key)
            if then != now:
                raise ValueError(f"{path} was written with {key}={then!r}; this run has {now!r}")


class StopSignals:
    """A block in which SIGINT and SIGTERM set ``number`` instead of ending the process, so that
    whoever looks at it can write a checkpoint first. A second SIGINT ends it as ever.

    Outside the main thread, where Python delivers no signals, nothing is changed.
    """

    def __init__(self):
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Have SIGINT and SIGTERM raise ``Interrupted``, so that everything is ended in order; a
    second SIGTERM changes nothing, a second SIGINT raises again. ``StopSignals`` comes first.

    Outside the main thread nothing is changed.
    """

    def end(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise stopped(number, None)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped(number: int, path: Path | None) -> Interrupted:
    """The exception of a run that wrote ``path`` because of the signal ``number``."""
    where = f"; the checkpoint is {path}" if path else ""
    return Interrupted(number, f"stopped by {signal.Signals(number).name}{where}")


def _read(directory: Path, name: str) -> Snapshot:
    values = json.loads((directory / f"{name}.json").read_text())
    return Snapshot(load_file(directory / f"{name}.safetensors"), values)


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values) + "\n")
