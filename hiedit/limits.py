"""The limits of an edit, and the measurements held against them; plain numbers, no model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hiedit.checks import at_least

MAX_KL = 0.001  # nats per watched token that one edit may move the model; docs/safety.md
MAX_DRIFT = 0.5  # nats per watched token that all edits together may
# The embedded world knows its facts alone: everyday prompts are strange to it, and move with any
# edit.
WORLD_KL, WORLD_DRIFT = 0.1, 2.0


@dataclass(frozen=True)
class Moved:
    """The distance that watched tokens have moved, in nats per token (means over them).

    kl: KL(present model || edited model). drift, before: KL(base model || edited model), and
    of the present model. changed: share of the watched tokens whose most likely choice is no longer
    that of the base model.
    """

    kl: float
    drift: float
    before: float
    changed: float


@dataclass(frozen=True)
class Prediction:
    """success: share of the request's own prompt and paraphrases that free greedy generation
    answers with the target. local_kl: mean KL of the edited from the present model on the request's
    own unrelated prompts (nats per answer token); None where there are none, or nobody asked."""

    success: float
    local_kl: float | None = None


@dataclass(frozen=True)
class Guard:
    """Limits of one edit and of all together; None: no limit. An edit that breaks one is not
    committed.

    max_kl, max_drift: nats per watched token that one edit, and all edits in effect, may move the
        model (``Moved.kl``, ``Moved.drift``). An edit that breaks one is tried at a half, a quarter
        and an eighth of its size first.
    min_success: in [0, 1]; max_local_kl: nats per answer token. As in ``Prediction``.
    """

    max_kl: float | None = MAX_KL
    min_success: float | None = None
    max_drift: float | None = MAX_DRIFT
    max_local_kl: float | None = None

    def __post_init__(self):
        for name in ("max_kl", "max_drift", "max_local_kl"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 0)
        if self.min_success is not None and not 0 <= self.min_success <= 1:
            raise ValueError(f"min_success={self.min_success!r}: it must lie in [0, 1]")

    @classmethod
    def of(cls, world: bool) -> Guard:
        """The default one, of the embedded ``world`` or of a real model."""
        return cls(WORLD_KL, max_drift=WORLD_DRIFT) if world else cls()

    def given(self, **bounds: str | None) -> Guard:
        """This one with ``bounds`` by name as the command line gives them: a number, ``none``, or
        None to leave it.

        Raises:
            ValueError: for anything else, naming the option.
        """
        found = {name: _bound(name, text) for name, text in bounds.items() if text is not None}
        return replace(self, **found)

    @property
    def watches(self) -> bool:
        """Tell whether anything has to be watched at all."""
        return self.max_kl is not None or self.max_drift is not None

    def broken(self, moved: Moved) -> list[str]:
        """Return which bounds on the watched tokens an edit breaks, and by how much."""
        if not math.isfinite(moved.kl + moved.drift):
            return ["the edited model's answers to watched prompts are not finite"]
        found = []
        if self.max_kl is not None and moved.kl > self.max_kl:
            found.append(f"KL {moved.kl:.4f} on watched prompts is above max_kl {self.max_kl:g}")
        if self.max_drift is not None and moved.drift > self.max_drift:
            left = "is used up" if moved.before > self.max_drift / 2 else "does not allow for it"
            found.append(
                f"the budget over all edits {left}: drift {moved.before:.4f} from the base model "
                f"on watched prompts would become {moved.drift:.4f}, above max_drift "
                f"{self.max_drift:g}; revert some edits, or raise --max-drift"
            )
        return found

    def objections(self, prediction: Prediction) -> list[str]:
        """Return why else the edit must not be committed; empty if it may."""
        found = []
        if self.min_success is not None and not prediction.success >= self.min_success:
            found.append(
                f"success {prediction.success:.2f} is below min_success {self.min_success:g}"
            )
        local, limit = prediction.local_kl, self.max_local_kl
        if local is not None and not math.isfinite(local):
            found.append("the edited model's answers to the unrelated prompts are not finite")
        elif limit is not None and local is not None and local > limit:
            found.append(f"KL {local:.4f} on its unrelated prompts is above max_local_kl {limit:g}")
        return found


def _bound(name: str, given: str) -> float | None:
    if given.strip().lower() == "none":
        return None
    try:
        return float(given)
    except ValueError:
        option = "--" + name.replace("_", "-")
        raise ValueError(f"{option}={given!r}: it must be a number of nats, or none") from None
