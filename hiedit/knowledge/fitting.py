"""Fitting a method's updater before its first edit: protection, curvature, typical
outputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from hiedit.backbone.model import Backbone
from hiedit.backbone.moments import phrasing_scatter, typical_power
from hiedit.config import MethodConfig
from hiedit.data.tokens import encode
from hiedit.knowledge.moments import curvature_of, moments_of
from hiedit.knowledge.own_text import own_text
from hiedit.progress import Progress, Update
from hiedit.types import EditRequest, TokenBatch
from hiedit.updaters.updater import Updater

Pair = tuple[str, str]  # prompt and answer


def fit_protection(
    backbone: Backbone,
    updater: Updater,
    pairs: Sequence[tuple[str, str]],
    facts: Sequence[Sequence[tuple[str, str]]] = (),
    own: Sequence[tuple[str, str]] = (),
) -> None:
    """Fit the updater's protection on sentences made of ``pairs`` (prompt, answer) and on the
    model's ``own`` text; ``facts``: the phrasings of one fact each, where the updater's
    ``phrasing`` wants them."""

    def tokens(some: Sequence[tuple[str, str]]) -> TokenBatch:
        return encode(backbone.tokenizer, list(some), padding_side="left").to(backbone.device)

    with Progress() as progress:

        def tell(what: str) -> Callable[[int, int], None]:
            return lambda done, total: progress.show(
                Update("protection", what, done, total, unit="texts")
            )

        config = updater.config
        every = [*pairs, *own]
        moments = moments_of(
            backbone, every, config.preserve_tokens, tell("measuring keys"),
            subjects=config.preserve_subjects > 0,
        )  # fmt: skip
        if config.own_weight and own:
            told = tell("measuring keys of own text")
            written = moments_of(backbone, own, config.preserve_tokens, told, subjects=False)
            moments = {n: found._replace(own=written[n].moment) for n, found in moments.items()}
        if config.step == "natural":
            updater.fit_curvature(curvature_of(backbone, every, tell("measuring curvature")))
    scatter = None
    if facts:
        scatter = phrasing_scatter(backbone, (tokens(fact) for fact in facts))
    updater.fit_protection(moments, scatter)


def own_pairs(backbone: Backbone, config: MethodConfig) -> tuple[Pair, ...]:
    """Return what the model writes by itself, as much as ``config`` protects."""
    if not config.updater.own_text:
        return ()
    with Progress() as progress:
        return own_text(
            backbone,
            config.updater.own_text,
            tell=lambda done, total: progress.show(
                Update("protection", "own text", done, total, unit="texts")
            ),
        )


def fit_power(backbone: Backbone, updater: Updater, pairs: Sequence[Pair], most: int = 64) -> None:
    """Tell ``updater`` how large its modules' outputs are, on the first ``most`` sentences made of
    ``pairs``."""
    tokens = encode(backbone.tokenizer, list(pairs[:most]), padding_side="left")
    updater.fit_power(typical_power(backbone, [tokens.to(backbone.device)]))


def preserved_pairs(
    config: MethodConfig, train: Sequence[EditRequest], preserve: Sequence[Pair]
) -> list[Pair]:
    """The (prompt, answer) pairs that ``build_method`` protects and asks: ``preserve``, else the
    unrelated prompts of ``train``; ValueError if there are none."""
    pairs = list(preserve) or [(p.prompt, p.answer) for r in train for p in r.locality if p.answer]
    if not pairs:
        raise ValueError(
            f"method {config.name!r} protects knowledge (updater.solver=protected or "
            "passes.preserved) and needs prompts with answers to preserve: give training records "
            "with locality prompts"
        )
    return pairs[: config.updater.preserve]


def phrasings_of(train: Sequence[EditRequest], config: MethodConfig) -> list[list[tuple[str, str]]]:
    """Return, by training edit, (phrasing, answer as the model has it) of its prompt and
    paraphrases; a warning where none has two."""
    found = [
        [(p, r.old_target or r.target) for p in (r.prompt, *r.paraphrases)]
        for r in train
        if r.paraphrases
    ]
    if not found:
        warnings.warn(
            f"method {config.name!r} would learn what phrasings of a fact share (method.updater."
            f"phrasing={config.updater.phrasing}), but no training edit has a paraphrase: it edits "
            "without",
            stacklevel=2,
        )
    return found[: config.updater.phrasing_edits]
