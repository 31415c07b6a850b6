"""Moments of keys and curvature of outputs on knowledge to preserve, kept for a model once they
were measured (``kept``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hiedit.backbone.curvature import output_curvature
from hiedit.backbone.model import Backbone
from hiedit.backbone.moments import KeyMoments, key_moments
from hiedit.data.subjects import find_subject
from hiedit.data.tokens import encode
from hiedit.knowledge.kept import Parts, kept, worth_keeping
from hiedit.types import TokenBatch

Pair = tuple[str, str]
FORMAT = 3  # of the files
MOMENTS = ("moment", "power", "ratio")  # what each module always has
BATCH = 64  # sentences in one forward pass
CURVED, CURVED_BATCH = 768, 16  # sentences that the curvature is measured on, and at once
Tell = Callable[[int, int], None]  # sentences done, of how many


def moments_of(
    backbone: Backbone,
    pairs: Sequence[Pair],
    tokens: str,
    tell: Tell = lambda done, total: None,
    subjects: bool = True,
) -> dict[str, KeyMoments]:
    """Return, by module, the moments of its keys on sentences made of ``pairs`` (beginning,
    ending), at the positions that ``edit_tokens`` calls ``tokens``; from the cache where they are
    there.
    subjects: whether those at the last tokens of subjects are wanted too."""

    def measure() -> dict[str, Parts]:
        batches = _batches(backbone, pairs, BATCH, tell, subjects)
        found = key_moments(backbone, batches, tokens)
        return {name: _parts(moments) for name, moments in found.items()}

    about = ["moments", FORMAT, sorted(map(list, pairs)), tokens, subjects]
    found = kept(backbone, "moments", about, measure, MOMENTS)
    return {name: _moments(parts) for name, parts in found.items()}


def curvature_of(
    backbone: Backbone, pairs: Sequence[Pair], tell: Tell = lambda done, total: None
) -> dict[str, Tensor]:
    """Return, by module, the Fisher information of its outputs [O, O] on ``CURVED`` of the
    sentences made of ``pairs``, spread evenly over them; from the cache where it is there."""
    some = [pairs[i * len(pairs) // CURVED] for i in range(CURVED)]
    some = list(dict.fromkeys(some))

    def measure() -> dict[str, Parts]:
        batches = _batches(backbone, some, CURVED_BATCH, tell, subjects=False)
        return {n: {"fisher": f} for n, f in output_curvature(backbone, batches).items()}

    about = ["curvature", FORMAT, sorted(map(list, some))]
    found = kept(backbone, "moments", about, measure, ["fisher"])
    return {name: parts["fisher"] for name, parts in found.items()}


def _batches(
    backbone: Backbone, pairs: Sequence[Pair], size: int, tell: Tell, subjects: bool
) -> Iterator[TokenBatch]:
    """Batch texts of like lengths, so that little is padding; the order of the sums is that of the
    lengths."""
    if worth_keeping(backbone):
        pairs = sorted(pairs, key=lambda pair: len(pair[0]))
    for start in range(0, len(pairs), size):
        tell(start, len(pairs))
        some = list(pairs[start : start + size])
        spans = [find_subject(prompt) for prompt, _ in some] if subjects else None
        batch = encode(backbone.tokenizer, some, padding_side="left", subjects=spans)
        yield batch.to(backbone.device)
    tell(len(pairs), len(pairs))


def _parts(moments: KeyMoments) -> Parts:
    found = moments._asdict() | {"ratio": torch.tensor(moments.ratio)}
    return {name: part for name, part in found.items() if part is not None}


def _moments(parts: Parts) -> KeyMoments:
    return KeyMoments(**(parts | {"ratio": float(parts["ratio"])}))
