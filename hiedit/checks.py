"""Checks of values, in the words of the key that holds them."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
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


def from_mapping(cls, values: Mapping[str, Any], where: str = ""):
    """Build the dataclass ``cls`` from nested mappings (a YAML file), checking keys and types.

    Raises:
        ValueError: on an unknown key, naming it and the nearest valid one, or a wrong type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        at = f"{where}={values!r}" if where else repr(values)
        raise ValueError(f"{at}: it must be a group of keys ({', '.join(fields)})")
    hints = typing.get_type_hints(cls)
    built = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{path}={value!r}: no such key{hint} (valid: {', '.join(fields)})")
        built[key] = _typed(hints[key], value, path)
    return cls(**built)


def _typed(hint: Any, value: Any, path: str) -> Any:
    """``value`` as ``hint`` wants it; ints pass for floats, a list of one type is checked whole."""
    if dataclasses.is_dataclass(hint):
        if value is None:
            raise ValueError(f"{path}=None: it must be a group of keys")
        return from_mapping(hint, value, path)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if option is type(None):
            if value is None:
                return None
        elif typing.get_origin(option) is list:
            if isinstance(value, list | tuple):
                inner = typing.get_args(option)[0]
                return [_typed(inner, v, f"{path}[{i}]") for i, v in enumerate(value)]
        elif option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        elif isinstance(value, option) and (option is bool) == isinstance(value, bool):
            return value
    names = ("null" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    wanted = " or ".join(names)
    raise ValueError(f"{path}={value!r} ({type(value).__name__}): it must be {wanted}")
