"""Hydra overrides in, a checked ``RunConfig`` out; a user's mistake is one ValueError."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence

from hiedit.catalogue import choices, config_dir
from hiedit.config import from_mapping
from hiedit.provenance import leaves
from hiedit.runconfig import RunConfig

GROUPS = ("model", "dataset", "method", "experiment", "distribution")


def register_schema(schema: type = RunConfig, name: str = "schema") -> None:
    """Tell Hydra every key and its default, so that any of them can be overridden."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name, dataclasses.asdict(schema()))


def compose(overrides: Sequence[str], schema: type = RunConfig, config: str = "config"):
    """The run that ``overrides`` describe (``method=hiedit stream.length=500``).

    schema: the dataclass of the root; config: the YAML file that begins it.

    Raises:
        ValueError: naming the key, its value and the nearest valid choice.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    register_schema(schema, "schema" if schema is RunConfig else f"{config}_schema")
    check_choices(overrides)
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = hydra_compose(config, list(overrides))
        plain = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error, overrides, schema)) from None
    return from_mapping(schema, plain)


def check_choices(overrides: Sequence[str]) -> None:
    """Raises ValueError for ``group=choice`` where there is no such choice."""
    for override in overrides:
        key, _, value = override.partition("=")
        value = value.strip("'\"").removesuffix(".yaml")
        if key in GROUPS and value and value != "null":
            valid = choices(key)
            if value not in valid:
                near = difflib.get_close_matches(value, valid, n=1, cutoff=0.3)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                known = f"valid are {', '.join(valid)}" if valid else "there is none to choose yet"
                raise ValueError(f"{key}={value}: {known}{hint}")


def explain(error: Exception, overrides: Sequence[str], schema: type = RunConfig) -> str:
    """Hydra's error in words, with the nearest valid key where a key is unknown."""
    known = leaves(dataclasses.asdict(schema()))
    for override in overrides:
        key, equals, value = override.partition("=")
        key = key.lstrip("+~")
        if not equals or key.startswith("hydra."):
            continue
        is_group = key in GROUPS or any(k.startswith(f"{key}.") for k in known)
        if key not in known and not is_group:
            near = difflib.get_close_matches(key, [*known, *GROUPS], n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]}?" if near else ""
            return f"{key}={value}: no such key{hint}"
    return str(error).splitlines()[0]
