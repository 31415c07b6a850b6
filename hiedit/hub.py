"""A check that what has to be fetched can be: asked once and quickly, before anybody tries for
long."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

PATIENCE = 5.0  # seconds


def check_hub(path: str) -> None:
    """Check the hub before the first file of a model is asked for.

    Where the hub does not answer, a model that was fetched before is read from the cache, without
    asking again.

    Raises:
        ValueError: where ``path`` is no directory, not in the cache, and the hub is silent.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(path).exists() or constants.HF_HUB_OFFLINE or answers(constants.ENDPOINT):
        return
    try:
        cached = isinstance(try_to_load_from_cache(path, "config.json"), str)
    except HFValidationError:  # not a name; the loader says so
        return
    if not cached:
        raise ValueError(
            f"model.path={path!r}: there is no such directory, the model is not in the cache, and "
            f"the hub ({constants.ENDPOINT}) does not answer: give a directory that holds its "
            "config.json (`hiedit plan` reads no more than that), a GGUF file, a name that `hiedit "
            "models` lists, or run this online"
        )
    constants.HF_HUB_OFFLINE = True  # or every file is asked for six times first


def answers(endpoint: str) -> bool:
    """Tell whether somebody listens at ``endpoint``; assumed where a proxy is between."""
    parts = urlsplit(endpoint)
    if parts.scheme in urllib.request.getproxies():
        return True
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), PATIENCE).close()
        return True
    except OSError:
        return False
