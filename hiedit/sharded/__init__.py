"""One model over several ranks with DeepSpeed ZeRO-3: for models larger than one device.

    launcher or group -> ranks -> settings -> loading (own shard of the checkpoint) -> Backbone

The only room that imports DeepSpeed, and only where it is used: ``require_deepspeed`` can be asked
anywhere. Every rank runs the same program on the same requests; weights are gathered layer by
layer for a forward pass, and what a commit or a checkpoint touches is the rank's own flat part.
"""

from __future__ import annotations

import importlib.util

REMEDY = (
    "a sharded model needs DeepSpeed: pip install 'hiedit[deepspeed]' "
    "(or set distribution=local, which keeps the whole model in one process)"
)


def require_deepspeed() -> None:
    """Raises ImportError with the remedy where DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError(REMEDY)
