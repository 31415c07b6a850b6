"""Outcomes of edit requests: at once, and after everything that came later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hiedit.backbone.model import Backbone
from hiedit.evaluation.metrics import answered
from hiedit.guard import own_prompts
from hiedit.ledger.records import ACTIVE, FOLDED, Record
from hiedit.types import EditRequest

COMMITTED, SKIPPED, REJECTED, PREDICTED = "committed", "skipped", "rejected", "predicted"


@dataclass(frozen=True)
class Edited:
    """The outcome of one request.

    status: ``committed``; ``skipped``, as the same edit is in effect; ``rejected``, see reasons;
    ``predicted`` by a dry run. id: in the ledger (of the earlier edit where skipped), else None.
    conflicts: ids of edits in effect with the same prompt and another answer.
    success, local_kl: see ``Prediction``. layers: modules touched. passes: shifts computed.
    kl, drift: see ``Moved``; None where nothing was watched. scale: below 1 where the edit was made
    smaller to keep the guard's bounds.
    """

    request: EditRequest
    status: str
    id: int | None = None
    reasons: tuple[str, ...] = ()
    conflicts: tuple[int, ...] = ()
    success: float | None = None
    kl: float | None = None
    layers: tuple[str, ...] = ()
    passes: int = 0
    seconds: float = 0.0
    drift: float | None = None
    scale: float = 1.0
    local_kl: float | None = None


@dataclass(frozen=True)
class Holding:
    """A check that the edits in effect still hold. checked: how many. success_then, success_now:
    mean share of their prompts answered as wanted, when committed and now. lost: ids of those that
    did hold and no longer do."""

    checked: int
    success_then: float
    success_now: float
    lost: tuple[int, ...]


def holding(backbone: Backbone, records: Sequence[Record]) -> Holding:
    """Ask the model as it is now about the edits in effect; of those with the same prompt the last
    one counts."""
    effective = [r for r in records if r.status in (ACTIVE, FOLDED)]
    latest = list({r.request.prompt: r for r in effective}.values())
    pairs = [(i, pair) for i, r in enumerate(latest) for pair in own_prompts(r.request)]
    given = answered(backbone, [pair for _, pair in pairs]).begins.float()
    owner = torch.tensor([i for i, _ in pairs], dtype=torch.int64)
    count = torch.bincount(owner, minlength=len(latest)).clamp(min=1)
    now = (torch.zeros(len(latest)).index_add(0, owner, given) / count).tolist()
    then = [float(r.report.get("success") or 0.0) for r in latest]
    lost = tuple(r.id for r, a, b in zip(latest, then, now, strict=True) if b < a)
    size = max(1, len(latest))
    return Holding(len(latest), sum(then) / size, sum(now) / size, lost)
