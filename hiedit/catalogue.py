"""The shipped ``configs/`` by name: methods, models, and what their files are made of.

A method's file may begin with ``defaults: [other, _self_]``, as Hydra has it: what ``other`` says,
and on top of it what the file says itself. Here that is resolved without Hydra, to the same values.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hiedit.checks import choice
from hiedit.config import MethodConfig, from_mapping

SELF = "_self_"


def config_dir() -> Path:
    """The Hydra groups: of the checkout, or of the installed package ``hiedit_configs``."""
    checkout = Path(__file__).resolve().parent.parent / "configs"
    if checkout.is_dir():
        return checkout
    import hiedit_configs

    return Path(next(iter(hiedit_configs.__path__)))


def choices(group: str) -> list[str]:
    """The names of one group (``method``, ``model``, ...), sorted; a file whose name begins with
    ``_`` is a part of others and no choice."""
    found = (path.stem for path in (config_dir() / group).glob("*.yaml"))
    return sorted(name for name in found if not name.startswith("_"))


def load_method(path: str | Path) -> MethodConfig:
    """A method from a YAML file (or the name of one in ``configs/method``).

    Raises:
        ValueError: naming the file, or the key and what would be valid.
    """
    path = Path(path)
    if not path.suffix and len(path.parts) > 1:
        raise ValueError(f"method={str(path)!r}: neither a YAML file nor a trained editor")
    if not path.suffix:
        choice("method", path.name, tuple(choices("method")))
        path = config_dir() / "method" / f"{path.name}.yaml"
    if not path.is_file():
        raise ValueError(f"method={str(path)!r}: there is no such file")
    return from_mapping(MethodConfig, _composed(path), "method")


def configured_model(model: str) -> dict:
    """Return what ``configs/model`` says about a path or hub name; empty if it is not there."""
    import yaml  # comes with transformers

    for path in sorted((config_dir() / "model").glob("*.yaml")):
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if values.get("path") == model:
            return values
    return {}


def _composed(path: Path, within: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a method's file, its defaults resolved. within: the files that it is a default
    of."""
    if path in within:
        chain = " -> ".join(p.name for p in (*within, path))
        raise ValueError(f"method={str(within[0])!r}: its defaults go in a circle ({chain})")
    values = _read(path)
    if not isinstance(values, Mapping) or "defaults" not in values:
        return values
    own = {key: value for key, value in values.items() if key != "defaults"}
    names = values["defaults"]
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or not names:
        raise ValueError(
            f"method={str(path)!r}: defaults={names!r}: it must be a list of names, as "
            "[_hiedit, _self_]"
        )
    if SELF not in names:
        names = [*names, SELF]
    found: dict[str, Any] = {}
    for name in names:
        more = own if name == SELF else _composed(_default(path, name), (*within, path))
        found = _merged(found, more)
    return found


def _default(path: Path, name: str) -> Path:
    """The file of the default ``name``: beside ``path``, or among the shipped ones."""
    beside, shipped = path.with_name(f"{name}.yaml"), config_dir() / "method" / f"{name}.yaml"
    for file in (beside, shipped):
        if file.is_file():
            return file
    valid = sorted(p.stem for p in shipped.parent.glob("*.yaml"))
    raise ValueError(
        f"method={str(path)!r}: its default {name!r} is neither beside it nor one of "
        f"{', '.join(valid)}"
    )


def _read(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"method={str(path)!r}: no YAML ({' '.join(str(error).split())})"
        ) from None


def _merged(below: Mapping[str, Any], above: Any) -> Any:
    """``above`` on top of ``below``: mappings key by key, anything else in place of it."""
    if not isinstance(above, Mapping):
        return above
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = _merged(under, value) if isinstance(under, Mapping) else value
    return merged
