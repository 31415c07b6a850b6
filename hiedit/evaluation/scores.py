"""The scores of a stream, as fractions; standard library only.

docs/metrics.md has the formula and the source of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

METRICS = ("ES", "GS", "LS")
SCORES = (
    *METRICS, "LS_gold", "ES_tf", "GS_tf", "LS_tf", "ES_end", "GS_end", "LS_known",
    "ES_prob", "GS_prob", "LS_prob", "ES_pos", "GS_pos", "LS_pos",
)  # fmt: skip


def number(value: Any) -> float | None:
    """``value`` as a float, or None where it is missing or not finite."""
    if value is None:
        return None
    value = float(value)
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Scores:
    """Efficacy, generalisation and locality, fractions in [0, 1], None where not measured.

    ES, GS: free greedy generation begins with the new answer, at a word boundary, on edit prompts
        and on held-out paraphrases. ES_end, GS_end: and ends there, or goes on with punctuation.
    LS: agreement with the unedited model on unrelated prompts, as many greedy tokens as the gold
        answer has.
    LS_gold: of the unrelated prompts that the unedited model answered with the gold answer, those
        that still are. LS_known: how many these are, of those with a gold answer.
    ES_tf, GS_tf, LS_tf: teacher-forced token accuracy (``LS_tf`` against the unedited model).
    *_prob: the new answer is more probable than the old one (LS: the other way round), as ROME and
        MEMIT compare them. *_pos: the same by token position, as RLEdit and HiEdit do.

    Raises:
        ValueError: if a score lies outside [0, 1].
    """

    ES: float | None = None
    GS: float | None = None
    LS: float | None = None
    LS_gold: float | None = None
    ES_tf: float | None = None
    GS_tf: float | None = None
    LS_tf: float | None = None
    ES_end: float | None = None
    GS_end: float | None = None
    LS_known: float | None = None
    ES_prob: float | None = None
    GS_prob: float | None = None
    LS_prob: float | None = None
    ES_pos: float | None = None
    GS_pos: float | None = None
    LS_pos: float | None = None

    def __post_init__(self):
        for name in SCORES:
            value = number(getattr(self, name))
            # float32 means overshoot 1 by an ulp; anything further is a percentage by mistake
            if value is not None and not -1e-6 <= value <= 1 + 1e-6:
                raise ValueError(f"Scores.{name} is {value}: it must be a fraction in [0, 1]")
            object.__setattr__(self, name, value if value is None else min(max(value, 0.0), 1.0))

    def mean(self) -> float | None:
        """Mean of those of ES, GS and LS that were measured."""
        known = [v for v in (self.ES, self.GS, self.LS) if v is not None]
        return sum(known) / len(known) if known else None
