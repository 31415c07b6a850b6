"""Rules that decide by what was measured: pure functions of the profiles."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from hiedit.backbone.moments import SINK
from hiedit.calibration.profile import Calibration, ModuleProfile, StepProfile
from hiedit.config import MethodConfig

COUNT = 8  # modules that are edited
FEWEST = 3  # that are to choose from; where sinks leave fewer, those that they own least are too
LEAST_GAIN = 1 / 3  # of the best module's; what gains less is not worth what it moves
SHARE = 0.5  # of a module's output power; where sinks hold more, they own it
FREE = 1e-4  # nats; a price below it is as good as none
LEAST_SUCCESS = 0.02  # below the best success
MORE_KL, MORE_NATS = 1.25, 0.01  # over the smallest KL, as a factor and beside it


def owned(profile: ModuleProfile) -> bool:
    """Tell whether sinks own the module: what it takes in, or what it gives out, is mostly
    theirs."""
    return profile.sink_ratio >= SINK or profile.sink_share > SHARE


def eligible(profiles: Sequence[ModuleProfile]) -> list[ModuleProfile]:
    """Those that may be chosen, in their order: no sink owns them, or where fewer than ``FEWEST``
    are left, sinks own them least."""
    ranked = sorted(profiles, key=lambda p: (owned(p), p.sink_ratio))
    free = ranked[: max(FEWEST, sum(not owned(p) for p in ranked))]
    return [p for p in profiles if p in free]


def worth(profile: ModuleProfile) -> float:
    """Gain over root price: a shift of twice the size has twice the gain and four times the
    price, so it does not depend on the step that was measured with."""
    return profile.gain / math.sqrt(max(profile.price, 0.0) + FREE)


def choose(profiles: Sequence[ModuleProfile], count: int = COUNT) -> tuple[str, ...]:
    """The names of at most ``count`` modules to edit, in the order of ``profiles``.

    Of the ``eligible`` ones, those are left out that gain less than ``LEAST_GAIN`` of the best; of
    the others those of the best ``worth`` stay. Where nothing gains (a model that knows nothing),
    those that gain most.
    """
    sound = [p for p in profiles if math.isfinite(p.gain) and math.isfinite(p.price)]
    free = eligible(sound or profiles)
    best = max(p.gain for p in free)
    enough = [p for p in free if p.gain >= LEAST_GAIN * best]
    by = worth if best > 0 else (lambda p: p.gain)
    ranked = sorted(enough or free, key=by, reverse=True)[:count]
    chosen = {p.name for p in ranked}
    return tuple(p.name for p in profiles if p.name in chosen)


def choose_step(steps: Sequence[StepProfile]) -> float:
    """The largest step whose success is within ``LEAST_SUCCESS`` of the best and whose KL is at
    most ``MORE_KL`` times the smallest of those, and ``MORE_NATS`` more; the smallest step where
    none was finite."""
    sound = [s for s in steps if math.isfinite(s.kl) and math.isfinite(s.success)]
    if not sound:
        return min(s.eta for s in steps)
    best = max(s.success for s in sound)
    able = [s for s in sound if s.success >= best - LEAST_SUCCESS]
    limit = MORE_KL * min(s.kl for s in able) + MORE_NATS
    return max(s.eta for s in able if s.kl <= limit)


def calibrated(config: MethodConfig, calibration: Calibration | None) -> MethodConfig:
    """``config`` with the measured step, where its steps are of the kind that was measured: closed
    form, protected, along the natural gradient."""
    updater = config.updater
    measured = updater.kind == "closed_form" and updater.step == "natural"
    if calibration is None or not measured:
        return config
    return dataclasses.replace(
        config, updater=dataclasses.replace(updater, eta=float(calibration.eta))
    )
