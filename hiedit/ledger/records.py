"""The ledger's input and output: entries, records, and their JSON.

Shape letters: ``O``/``I`` out and in features, ``r`` rank.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hiedit.ledger.errors import NotFiniteError
from hiedit.ledger.files import Spec
from hiedit.ledger.fingerprint import ModuleInfo
from hiedit.types import EditRequest, Locality, Shift, Shifts

ACTIVE, REVERTED, FOLDED, DROPPED = "active", "reverted", "folded", "dropped"
STATUSES = (ACTIVE, REVERTED, FOLDED, DROPPED)
MERGED_ROWS = 256  # rank rows per pass over an accumulator when many edits are replayed


@dataclass(frozen=True)
class Entry:
    """One edit to be committed.

    request: what was asked for.
    shifts: by module name; modules whose scale is 0 throughout take no part.
    method: the name of the method, for the record.
    report: JSON values (success, kl, passes, ...), for the record.
    memory: tensors that the editor wants kept with the edit, by name; any shape and common dtype.
    """

    request: EditRequest
    shifts: Shifts
    method: str = ""
    report: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """One edit of the history.

    id: its place in the canonical order, from 1; never used again.
    created: UTC, ISO 8601.
    status: ``active``; ``reverted``, can be restored; ``folded`` into the base snapshot, in effect
        for good; ``dropped``, gone for good.
    layers, ranks: the modules that it changes, in the model's order, and the rank in each.
    segment: the file that holds its factors, None once they are gone.
    """

    id: int
    created: str
    status: str
    request: EditRequest
    method: str
    layers: tuple[str, ...]
    ranks: tuple[int, ...]
    report: Mapping[str, Any]
    segment: str | None


@dataclass(frozen=True)
class Event:
    """Something that was done to the ledger: ``commit``, ``revert``, ``restore``, ``snapshot``,
    ``compact``, ``fold``, ``drop``; time is UTC, ISO 8601."""

    id: int
    time: str
    what: str
    ids: tuple[int, ...]


def request_json(request: EditRequest) -> str:
    """Fields that are empty or None are left out."""
    fields = dataclasses.asdict(request)
    return json.dumps({name: value for name, value in fields.items() if value not in (None, ())})


def request_from(text: str) -> EditRequest:
    """The inverse of ``request_json``; fields of later versions are ignored."""
    known = {f.name for f in dataclasses.fields(EditRequest)}
    given = {name: value for name, value in json.loads(text).items() if name in known}
    for name in ("paraphrases", "heldout"):
        given[name] = tuple(given.get(name, ()))
    given["locality"] = tuple(Locality(**item) for item in given.get("locality", ()))
    return EditRequest(**given)


def report_json(report: Mapping[str, Any]) -> str:
    """Raises ValueError naming the first key whose value is not JSON (NaN is not)."""
    for key, value in report.items():
        try:
            json.dumps({key: value}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"report[{key!r}] is {value!r}: it must be a JSON value ({error})"
            ) from None
    return json.dumps(dict(report))


@torch.no_grad()
def baked(shifts: Shifts, modules: Mapping[str, ModuleInfo], what: str) -> dict[str, Shift]:
    """The shifts as stored: fp32, without the rank rows of scale 0, scale multiplied into B.

    ``B * scale`` is rounded to fp32 exactly as ``accumulate_`` rounds it, so the bits of the result
    are the same. In the model's order; modules of rank 0 are left out.

    Raises:
        ValueError: for a module that the ledger does not have, shapes that do not fit it, or a
            factor that is not finite; ``what`` names the edit.
    """
    unknown = [name for name in shifts if name not in modules]
    if unknown:
        raise ValueError(
            f"{what}: {unknown[0]!r} is not an editable module of this ledger; those are "
            f"{', '.join(modules)}"
        )
    found = {name: _baked(shifts[name], modules[name], what) for name in modules if name in shifts}
    return {name: shift for name, shift in found.items() if shift.rank}


def _baked(shift: Shift, module: ModuleInfo, what: str) -> Shift:
    A, B, scale = shift.A, shift.B, shift.scale
    at = f"{what}: the shift of {module.name}"
    rank = A.shape[0] if A.dim() else 0
    wanted = ((rank, module.in_features), (module.out_features, rank), (rank,))
    ones = (rank,) if scale is None else tuple(scale.shape)
    given = (tuple(A.shape), tuple(B.shape), ones)
    if given != wanted:
        raise ValueError(f"{at} has A, B, scale of shapes {given}: they must be {wanted}")
    for t in (A, B) if scale is None else (A, B, scale):
        if not t.dtype.is_floating_point or t.dtype == torch.float64:
            raise ValueError(f"{at} is {t.dtype}: factors must be float32, bfloat16 or float16")
    A, B = A.detach().float(), B.detach().float()
    if scale is not None:
        scale = scale.detach().float()
        kept = scale.nonzero().squeeze(-1)
        A, B = A[kept], B[:, kept] * scale[kept]
    if not (bool(A.isfinite().all()) and bool(B.isfinite().all())):
        raise NotFiniteError(f"{at} is not finite: nothing was changed")
    return Shift(A.cpu().contiguous(), B.cpu().contiguous())


def factor_specs(edit: int, shifts: Iterable[tuple[ModuleInfo, int]]) -> list[Spec]:
    """The tensors of an edit's factors in its file, in order; shifts: modules and ranks."""
    return [
        spec
        for module, rank in shifts
        for spec in (
            Spec(f"{edit}/{module.name}/A", "F32", (rank, module.in_features)),
            Spec(f"{edit}/{module.name}/B", "F32", (module.out_features, rank)),
        )
    ]


def merged(stream: Iterable[Shifts]) -> Iterator[dict[str, Shift]]:
    """The same rank rows in the same order, those of several edits together.

    An accumulator is then read and written once per ``MERGED_ROWS`` rows instead of once per edit;
    every element still sees every row in order, so no bit changes.
    """
    waiting: dict[str, list[Shift]] = {}
    rows: dict[str, int] = {}
    for shifts in stream:
        for name, shift in shifts.items():
            waiting.setdefault(name, []).append(shift)
            rows[name] = rows.get(name, 0) + shift.rank
            if rows[name] >= MERGED_ROWS:
                yield {name: _joined(waiting.pop(name))}
                del rows[name]
    for name, shifts in waiting.items():
        yield {name: _joined(shifts)}


def _joined(shifts: list[Shift]) -> Shift:
    return Shift(torch.cat([s.A for s in shifts]), torch.cat([s.B for s in shifts], dim=1))
