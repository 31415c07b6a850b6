"""A calibration's findings, and the file that keeps them: JSON, written whole or not at all.

CACHE/calibration/FINGERPRINT.json     by model
LEDGER/calibration.json                a copy beside the edits that were made by it
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hiedit.durable import write_text
from hiedit.models import cache_dir

FORMAT = 1
BESIDE_LEDGER = "calibration.json"


@dataclass(frozen=True, kw_only=True)
class ModuleProfile:
    """One module, edited alone.

    sink_ratio: norm of its longest key over the median one, on sentences to preserve. sink_share:
    share in [0, 1] of its outputs' power that tokens hold whose output is as far out as a sink's
    key. gain: fall of the cross-entropy of an edit and its paraphrases in one pass (nats); price:
    KL on unrelated prompts (nats), means over the edits; NaN where it was not measured, because
    sinks own the module, or was not finite.
    """

    name: str
    sink_ratio: float
    gain: float
    price: float
    sink_share: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """One step size with the chosen modules, each edit made in full on the unedited model.

    success: share of prompts and paraphrases that the model then answers with the edit's answer.
    passes: mean of an edit. kl: mean on unrelated prompts (nats).
    """

    eta: float
    success: float
    passes: float
    kl: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measurements of one model, and what follows from them.

    model: its name, for people. fingerprint: see ``fingerprint``. modules: the chosen ones, in the
    model's order. eta: step of a protected closed-form edit, relative to a module's typical output.
    profiles: of every candidate; steps: of every step size that was tried. edits: made per module;
    known: how many of them are of facts that the model knew. seconds: it took. versions, created:
    with what it was made, and when (ISO 8601).
    """

    model: str
    fingerprint: str
    modules: tuple[str, ...]
    eta: float
    profiles: tuple[ModuleProfile, ...]
    edits: int
    versions: Mapping[str, str]
    created: str
    steps: tuple[StepProfile, ...] = ()
    known: int = 0
    seconds: float = 0.0

    def as_json(self) -> str:
        """A number that is not finite is null."""
        values = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps(_finite(values), indent=1, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def place(fingerprint: str) -> Path:
    """Return where the calibration of a model is kept; need not exist."""
    return cache_dir() / "calibration" / f"{fingerprint}.json"


def cached(fingerprint: str) -> Calibration | None:
    """The calibration of a model, where there is one.

    Raises:
        ValueError: if its file is damaged, or is of another model.
    """
    path = place(fingerprint)
    if not path.is_file():
        return None
    found = read(path)
    if found.fingerprint != fingerprint:
        raise ValueError(
            f"{path} is of another model (fingerprint {found.fingerprint[:12]}): delete it"
        )
    return found


def write(calibration: Calibration, path: str | Path) -> Path:
    """Puts ``calibration`` at ``path``; another process sees all of it or what was there before."""
    return write_text(Path(path).expanduser(), calibration.as_json())


def read(path: str | Path) -> Calibration:
    """Return what ``write`` wrote.

    Raises:
        ValueError: if there is no such file, or it is damaged, naming it and what to do.
    """
    path = Path(path).expanduser()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError("written by another version of HiEdit")
        return _calibration(values)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such calibration") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path} is no calibration, or damaged ({what}): delete it, and the model is measured "
            "again"
        ) from None


def _calibration(values: dict[str, Any]) -> Calibration:
    modules = tuple(str(name) for name in values.pop("modules"))
    profiles = tuple(_numbers(ModuleProfile, one) for one in values.pop("profiles"))
    steps = tuple(_numbers(StepProfile, one) for one in values.pop("steps"))
    found = Calibration(modules=modules, profiles=profiles, steps=steps, **values)
    if not modules or not isinstance(found.fingerprint, str):
        raise ValueError("it names no modules or no model")
    if not isinstance(found.eta, int | float) or not found.eta > 0:
        raise ValueError(f"eta={found.eta!r} is no step")
    return found


def _numbers(kind, values: dict[str, Any]):
    """A profile, with NaN again where JSON has null."""
    floats = {f.name for f in dataclasses.fields(kind) if f.type == "float"}
    return kind(**{
        key: (math.nan if value is None else float(value)) if key in floats else value
        for key, value in values.items()
    })  # fmt: skip
