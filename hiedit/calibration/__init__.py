"""Measuring a model before it is edited: where an edit takes, at what price, how large a
step may be. Measured once for a model and kept, instead of constants that fit another one.

    model -> sinks, single-module effects -> choose -> modules -> steps -> choose_step -> eta

profile: what is found, and its file. rules: how the figures decide. measure: taking them.
"""

from hiedit.calibration.measure import calibrate
from hiedit.calibration.profile import (
    Calibration,
    ModuleProfile,
    StepProfile,
    cached,
    place,
    read,
    write,
)
from hiedit.calibration.rules import calibrated, choose, choose_step, eligible, owned
from hiedit.models.identity import fingerprint

__all__ = [
    "Calibration",
    "ModuleProfile",
    "StepProfile",
    "cached",
    "calibrate",
    "calibrated",
    "choose",
    "choose_step",
    "eligible",
    "fingerprint",
    "owned",
    "place",
    "read",
    "write",
]
