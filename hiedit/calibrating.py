"""The modules that are edited where nobody names any: those of the model's calibration, from its
file or measured now, with a bar; otherwise the stated default.

    Editor.from_pretrained, hiedit evaluate, launch/train.py -> calibration_for -> the room
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from hiedit.backbone.model import Backbone
from hiedit.calibration import Calibration, cached, calibrate, fingerprint, place, read, write
from hiedit.calibration.profile import BESIDE_LEDGER
from hiedit.catalogue import configured_model, load_method
from hiedit.experiment import load_backbone
from hiedit.methods import trained_modules
from hiedit.progress import Progress, Update
from hiedit.runconfig import RunConfig
from hiedit.types import EditRequest

MEASURED = "closed-form"  # the method whose step is
LARGEST = 2_000_000_000  # parameters of a model that is measured without being asked to


def note(text: str) -> None:
    """Says on standard error what a person should know."""
    print(text, file=sys.stderr, flush=True)


def calibration_for(
    backbone: Backbone,
    name: str = "",
    *,
    requests: Sequence[EditRequest] | None = None,
    edits: int = 16,
    again: bool = False,
    keep: bool = True,
) -> Calibration:
    """The kept calibration of the model of ``backbone``; where there is none (or ``again``),
    measured now, and kept in the cache.

    Raises:
        ValueError: if the kept file is damaged, or as ``calibrate``.
    """
    model = backbone.model
    if not again and (found := cached(fingerprint(model))) is not None:
        return found
    with Progress() as progress:
        note("calibrating: which modules take an edit, and at what step (docs/calibration.md)")

        def show(stage: str, done: int, total: int) -> None:
            unit = {"effects": "modules", "steps": "edits"}.get(stage, "facts")
            progress.show(Update("calibration", stage, done, total, unit=unit))

        found = calibrate(
            model, backbone.tokenizer, requests, edits=edits, progress=show, name=name,
            place=backbone.place, steps=load_method(MEASURED).updater,
        )  # fmt: skip
    if found.known < found.edits:
        note(
            f"calibration: the model knew {found.known} of the {found.edits} facts that it was "
            "measured with; `hiedit calibrate --input` takes edits of your own"
        )
    if not any(step.success for step in found.steps):
        note("calibration: none of the edits took in the chosen modules; --modules names others")
    if keep:
        try:
            write(found, place(found.fingerprint))
        except OSError as error:
            note(f"calibration: not kept ({error}); set HIEDIT_CACHE to a directory of yours")
    return found


def looked_up(backbone: Backbone, name: str = "") -> Calibration | None:
    """``calibration_for`` a model that is about to be edited; None, and a note, for one that is too
    large to be measured without being asked to."""
    model = backbone.model
    count = sum(p.numel() for p in model.parameters())
    if count > LARGEST and not place(fingerprint(model)).is_file():
        note(
            f"not calibrated: the model has {count / 1e9:.1f}e9 parameters; its default modules "
            "are edited. `hiedit calibrate` measures it, --modules names others"
        )
        return None
    return calibration_for(backbone, name)


def prepared(
    backbone: Backbone, ledger: str | Path, unnamed: bool, name: str = ""
) -> tuple[Backbone, Calibration | None]:
    """``backbone`` and the calibration that an editor with ``ledger`` works by: the one beside the
    edits that are there, or where modules are ``unnamed`` the model's, whose modules it then has;
    else None."""
    directory = Path(ledger).expanduser()
    if (directory / "ledger.db").is_file():
        kept = directory / BESIDE_LEDGER
        return backbone, read(kept) if kept.is_file() else None
    found = looked_up(backbone, name) if unnamed else None
    if found is None:
        return backbone, None
    write(found, directory / BESIDE_LEDGER)
    chosen = Backbone(backbone.model, backbone.tokenizer, found.modules)
    chosen.place = backbone.place
    return chosen, found


def named_already(config: RunConfig, editor: str | None = None) -> RunConfig:
    """``config`` with the modules of the trained ``editor`` or of ``configs/model``, where it names
    none itself."""
    if config.model.modules is not None:
        return config
    modules = trained_modules(editor) if editor else None
    return _with(config, modules or configured_model(config.model.path).get("modules"))


def measured(config: RunConfig) -> RunConfig:
    """``config`` with the modules of the model's calibration, where it names none."""
    if config.model.modules is not None or not config.calibrate:
        return config
    found = looked_up(load_backbone(config.model), config.model.name)
    if found is None:
        return config
    print(f"modules by calibration: {', '.join(found.modules)}", flush=True)
    return _with(config, found.modules)


def _with(config: RunConfig, modules: Sequence[str] | None) -> RunConfig:
    named = list(modules) if modules else None
    return dataclasses.replace(config, model=dataclasses.replace(config.model, modules=named))
