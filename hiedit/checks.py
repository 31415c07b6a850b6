"""Checks of single values, in the words of the key that holds them."""

from __future__ import annotations

import difflib
from typing import Any


def choice(key: str, value: Any, valid: tuple[str, ...]) -> None:
    """Raises ValueError naming ``key``, ``value`` and the nearest valid choice."""
    if value not in valid:
        near = difflib.get_close_matches(str(value), valid, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{key}={value!r}: valid are {', '.join(valid)}{hint}")


def at_least(key: str, value: float, low: float, strict: bool = False) -> None:
    """Raises ValueError if ``value`` is below ``low`` (or equal to it, where ``strict``)."""
    if not (value > low if strict else value >= low):
        raise ValueError(f"{key}={value!r}: it must be {'>' if strict else '>='} {low}")
