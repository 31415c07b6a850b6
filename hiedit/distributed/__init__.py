"""Rollout workers and a learner as Ray actors, thin shells over ``hiedit.rl``.

The only room that imports Ray, and only where it is used: ``require_ray`` can be asked anywhere.
"""

from __future__ import annotations

import importlib.util

REMEDY = "distribution.kind=ray needs Ray: pip install 'hiedit[ray]' (or set distribution=local)"


def require_ray() -> None:
    """Raises ImportError with the remedy where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ImportError(REMEDY)
