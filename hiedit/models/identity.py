"""The identity of a model: a fingerprint that takes a second at most and changes with the
weights."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

SAMPLE = 64 << 10  # bytes of every matrix
# Of a config: what says where a model is from and how it was loaded, and not what it is.
_PASSING = ("transformers_version", "dtype", "torch_dtype", "quantization_config", "use_cache")


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """SHA-256 in hex over the model's config and the first ``SAMPLE`` bytes of every matrix.

    It is of the weights as they are loaded: the same checkpoint in another dtype has another one.
    """
    found = hashlib.sha256(_described(model).encode())
    for name, parameter in model.named_parameters():
        found.update(f"\n{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        if parameter.dim() == 2:
            first = parameter.detach().reshape(-1)[: SAMPLE // parameter.element_size()]
            found.update(first.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _described(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    kept = {k: v for k, v in values.items() if k not in _PASSING and not k.startswith("_")}
    return type(model).__name__ + json.dumps(kept, sort_keys=True, default=str)
