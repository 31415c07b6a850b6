"""Bytes that a rank sends, measured where DeepSpeed sends them, and the least that ZeRO-3 must.

A rank that holds ``1/R`` of a tensor sends its part to ``R - 1`` others when it is gathered,
whatever the algorithm (a ring passes it on in ``R - 1`` hops: the same bytes per rank).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from hiedit.sharded.loading import ShardedBackbone


@contextlib.contextmanager
def counted(backbone: ShardedBackbone) -> Iterator[dict[str, int]]:
    """Count every gather of a parameter in the block; yields bytes sent by this rank by purpose
    (``gather`` of weights, ``factors``, ``logits``, ``reduce``, ``agree``), complete at the end."""
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    ranks = backbone.ranks
    before, found = dict(ranks.traffic.sent), {}
    kind = coordinator.PartitionedParameterCoordinator
    name = "_PartitionedParameterCoordinator__all_gather_params"
    original = getattr(kind, name)

    def gather(self, params, forward):
        missing = [p for p in params if p.ds_status.name == "NOT_AVAILABLE"]
        for p in missing:
            ranks.traffic.add(
                "gather", (ranks.world - 1) * p.ds_tensor.ds_numel * p.ds_tensor.element_size()
            )
        ranks.traffic.add("gathers", len(missing))
        return original(self, params, forward)

    setattr(kind, name, gather)
    try:
        yield found
    finally:
        setattr(kind, name, original)
        sent = ranks.traffic.sent
        found.update({k: sent[k] - before.get(k, 0) for k in sent})


def least(backbone: ShardedBackbone, forwards: int, backwards: int) -> int:
    """Bytes that a rank must send for so many passes through the whole model: every weight that is
    not kept whole (``ds_persist``) once a forward, those of the layers from the lowest editable
    one on once more a backward."""
    import re

    ranks, layer = backbone.ranks, re.compile(r"\.(\d+)\.")
    lowest = min(int(m[1]) for name in backbone.names if (m := layer.search(name)))
    forward = backward = 0
    for name, p in backbone.model.named_parameters():
        if p.ds_persist:
            continue
        size = (ranks.world - 1) * p.ds_tensor.ds_numel * p.ds_tensor.element_size()
        forward += size
        place = layer.search(name)
        above = int(place[1]) >= lowest if place else not name.endswith("embed_tokens.weight")
        backward += size * (above or p is _tied_head(backbone))
    return forwards * forward + backwards * backward


def _tied_head(backbone: ShardedBackbone):
    head = backbone.model.get_output_embeddings()
    return None if head is None else head.weight
