"""Measuring a model: where its sinks are, what its modules do to an edit, how large a step may be.

Edits are of facts that the model knows, made on trial and taken back: no weight is ever touched.
Protection is fitted for some modules at a time, so that memory does not grow with the model's
depth, and effects are measured a few layers at a time, because what stands below the lowest of them
is computed once for all.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from torch import nn

from hiedit.backbone.curvature import output_curvature
from hiedit.backbone.losses import answer_hits, answer_kl, mean_by_row
from hiedit.backbone.model import Backbone, at_tokens
from hiedit.backbone.modules import candidates, linear_layers
from hiedit.backbone.moments import SINK, KeyMoments, key_moments
from hiedit.calibration.profile import Calibration, ModuleProfile, StepProfile
from hiedit.calibration.rules import choose, choose_step, eligible
from hiedit.config import PassesConfig, Place, SelectorConfig, UpdaterConfig
from hiedit.data.neutral import NEUTRAL
from hiedit.data.tokens import encode
from hiedit.models.identity import fingerprint
from hiedit.policy.selectors import Selector
from hiedit.provenance import environment_tags
from hiedit.rl.effects import effects_apart
from hiedit.rl.environment import Environment
from hiedit.rl.reference import Pair
from hiedit.rl.rollout import Rollout
from hiedit.rl.sequences import draw_contexts
from hiedit.types import EditBatch, EditRequest, TokenBatch
from hiedit.updaters.updater import Updater
from hiedit.world import world_requests

UPDATER = UpdaterConfig(
    kind="closed_form", solver="protected", step="relative", preserve_tokens="all", eta=0.3
)
# What makes the edits whose step is measured, where nobody says.
NATURAL = UpdaterConfig(kind="closed_form", solver="protected", step="natural", freedom=2.0)
CURVED = 16  # sentences at once that the curvature is measured on
CONTEXTS = 3  # behind which an edit is made, where the model's place has no fewer
PASSES = PassesConfig(max=10, target_probability=0.8)
ETAS = (0.1, 0.2, 0.3, 0.45)
STEP_EDITS = 6  # of which every step size is tried
PRESERVE = 256  # sentences that the protection is fitted on
DRAWN = 2  # texts from the model itself among the prompts that a price is measured on
ASKED = 768  # facts that are asked at most to find those that the model knows
BATCH = 64  # sequences in a forward pass
LAYERS = 6  # modules whose effects are measured at a time
MOMENT_BYTES = 1 << 30  # of second moments that are held at once

Tell = Callable[[str, int, int], None]  # stage, done, of how many


def calibrate(
    model: nn.Module,
    tokenizer,
    requests: Sequence[EditRequest] | None = None,
    preserve: Sequence[Pair] | None = None,
    edits: int = 16,
    progress: Tell = lambda stage, done, total: None,
    seed: int = 0,
    name: str = "",
    place: Place = Place(),  # noqa: B008 (frozen, without state)
    steps: UpdaterConfig = NATURAL,
) -> Calibration:
    """Measure ``model``, whose weights stay as they are, bit for bit.

    requests: edits to measure with; those whose ``old_target`` the model gives come first, and
    where they are fewer than ``edits``, others fill up. None: facts of the packaged world.
    preserve: (prompt, answer) pairs to protect; None: everyday sentences and unrelated prompts of
    requests that are not measured with. name: of the model, for people. place: where edits act
    on it. steps: of the method whose step is measured; it goes along the natural gradient.

    Raises:
        ValueError: if no module is known for a candidate, or there is no request.
    """
    start = time.perf_counter()
    names = list(candidates(model))
    requests = list(world_requests("train", seed) if requests is None else requests)
    if not requests:
        raise ValueError("calibrate: no edits to measure with were given")
    asking = Backbone(model, tokenizer, names)
    chosen, known = known_first(asking, requests, edits, progress)
    contexts = min(CONTEXTS, place.contexts)
    given = Given(
        updater=dataclasses.replace(UPDATER, tokens=place.tokens, contexts=contexts),
        requests=tuple(chosen),
        preserve=tuple(preserve or unrelated(requests, chosen))[:PRESERVE],
        contexts=draw_contexts(asking, contexts, seed),
        watched=tuple(drawn_pairs(asking, DRAWN, seed + 1)),
    )
    profiles: list[ModuleProfile] = []

    def measured(modules: int) -> None:
        progress("effects", modules, len(names))

    measured(0)
    for group in _groups(model, names):
        profiles += _profiles(Backbone(model, tokenizer, group), given, measured, len(profiles))
    modules = choose(profiles)
    found = _steps(Backbone(model, tokenizer, modules), given, steps, progress)
    return Calibration(
        model=name or type(model).__name__, fingerprint=fingerprint(model), modules=modules,
        eta=choose_step(found), profiles=tuple(profiles), steps=tuple(found), edits=len(chosen),
        known=known, versions=dict(environment_tags()), seconds=time.perf_counter() - start,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Given:
    """The means of measuring. updater: that makes the edits; requests: the edits; preserve: what
    the protection is fitted on; contexts: what the edits are made behind; watched: unrelated
    prompts of all edits."""

    updater: UpdaterConfig
    requests: tuple[EditRequest, ...]
    preserve: tuple[Pair, ...]
    contexts: tuple[str, ...]
    watched: tuple[Pair, ...]


@torch.no_grad()
def known_first(
    backbone: Backbone, requests: Sequence[EditRequest], wanted: int, progress: Tell
) -> tuple[list[EditRequest], int]:
    """``wanted`` of ``requests`` (fewer where there are not as many), and how many of them are of
    facts that the model knows: its greedy answer begins with ``old_target``. Those come first; at
    most ``ASKED`` are asked."""
    askable = [r for r in requests if r.old_target][:ASKED]
    known: list[EditRequest] = []
    for at in range(0, len(askable), BATCH):
        some = askable[at : at + BATCH]
        pairs = [(r.prompt, r.old_target) for r in some]
        answers = backbone.answers(_encoded(backbone, pairs))
        right = mean_by_row(answer_hits(answers).float(), answers) == 1
        known += [r for r, on in zip(some, right.tolist(), strict=True) if on]
        progress("asking what it knows", min(len(known), wanted), wanted)
        if len(known) >= wanted:
            break
    known = known[:wanted]
    others = [r for r in requests if r not in known][: wanted - len(known)]
    return [*known, *others], len(known)


def unrelated(requests: Sequence[EditRequest], measured: Sequence[EditRequest]) -> list[Pair]:
    """Everyday sentences, then the unrelated prompts of ``requests``, without those that ask
    something of the ``measured``."""
    asked = {p for r in measured for p in (r.prompt, *r.paraphrases, *r.heldout)}
    asked |= {place.prompt for r in measured for place in r.locality}
    found = [(p.prompt, p.answer) for r in requests for p in r.locality if p.answer]
    return list(dict.fromkeys([*NEUTRAL, *(pair for pair in found if pair[0] not in asked)]))


def drawn_pairs(backbone: Backbone, count: int, seed: int) -> list[Pair]:
    """``count`` texts drawn from the model itself, the last word of each as the answer; everyday
    sentences in place of those that are one word."""
    texts = [text.rstrip(".").rpartition(" ") for text in draw_contexts(backbone, count, seed)]
    pairs = [(head, last) for head, _, last in texts if head.strip() and last.strip()]
    return [*pairs, *random.Random(seed).sample(NEUTRAL, count)][:count]


def _groups(model: nn.Module, names: Sequence[str]) -> Iterator[list[str]]:
    """Runs of ``names`` whose second moments, summed and fitted, take ``MOMENT_BYTES`` at most."""
    layers, group, held = linear_layers(model), [], 0
    for name in names:
        size = 8 * layers[name].in_features ** 2
        if group and held + size > MOMENT_BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group


def _profiles(
    backbone: Backbone, given: Given, measured: Callable[[int], None], before: int
) -> list[ModuleProfile]:
    """Profile every module of ``backbone``; effects of those alone that may be chosen. measured:
    told how many modules are done, ``before`` of them by an earlier call."""
    moments = key_moments(backbone, _batches(backbone, given.preserve))
    shares = sink_shares(backbone, _batches(backbone, given.preserve[:BATCH]))
    found = {
        n: ModuleProfile(
            name=n, sink_ratio=float(moments[n].ratio), sink_share=shares[n],
            gain=math.nan, price=math.nan,
        )
        for n in backbone.names
    }  # fmt: skip
    names = [p.name for p in eligible(list(found.values()))]
    for at in range(0, len(names), LAYERS):
        some = names[at : at + LAYERS]
        part = Backbone(backbone.model, backbone.tokenizer, some)
        effects = effects_apart(
            Environment(part), _fitted(part, moments, given.updater), given.requests,
            contexts=given.contexts, watched=given.watched, at_once=BATCH,
        )  # fmt: skip
        for name, gain, price in zip(some, *(e.mean(0).tolist() for e in effects), strict=True):
            found[name] = dataclasses.replace(found[name], gain=gain, price=price)
        measured(before + backbone.names.index(some[-1]) + 1)
    measured(before + len(backbone.names))
    return list(found.values())


@torch.no_grad()
def sink_shares(backbone: Backbone, batches: Iterator[TokenBatch]) -> dict[str, float]:
    """Return, by module, the share of its outputs' power that tokens hold whose output is more than
    ``SINK`` times as long as the median one."""
    sizes: dict[str, list[torch.Tensor]] = {n: [] for n in backbone.modules}
    for batch in batches:
        where = batch.attention.bool()
        with backbone.capture() as (_, outputs):
            backbone.answers(batch)
        for name, found in sizes.items():
            rows = at_tokens(outputs[name], where, batch.attention)
            found.append(rows.detach().float().square().sum(-1))
    joined = {n: torch.cat(found) for n, found in sizes.items()}
    return {
        n: float(s[s > SINK**2 * s.median()].sum() / s.sum().clamp(min=1e-20))
        for n, s in joined.items()
    }


def _fitted(
    backbone: Backbone, moments: Mapping[str, KeyMoments], config: UpdaterConfig
) -> Updater:
    updater = Updater(backbone.names, backbone.shape_groups(), config).to(backbone.device)
    updater.fit_protection(moments)
    return updater


def _steps(
    backbone: Backbone, given: Given, steps: UpdaterConfig, progress: Tell
) -> list[StepProfile]:
    moments = key_moments(backbone, _batches(backbone, given.preserve))
    tokens, contexts = given.updater.tokens, given.updater.contexts
    config = dataclasses.replace(steps, tokens=tokens, contexts=contexts)
    updater = _fitted(backbone, moments, config)
    updater.fit_curvature(output_curvature(backbone, _batches(backbone, given.preserve, CURVED)))
    selector = Selector(backbone.names, backbone.shape_groups(), SelectorConfig(kind="all"))
    env, requests, found = Environment(backbone), given.requests[:STEP_EDITS], []
    for number, eta in enumerate(ETAS):
        _set_eta(updater, eta)
        rollout = Rollout(env, selector, updater, PASSES, observe=False, contexts=given.contexts)
        rows = []
        for request in requests:
            rows.append(_one(rollout, request, given.watched))
            progress("steps", number * len(requests) + len(rows), len(ETAS) * len(requests))
        success, passes, kl = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        found.append(StepProfile(eta=eta, success=success, passes=passes, kl=kl))
    return found


def _set_eta(updater: Updater, eta: float) -> None:
    with torch.no_grad():
        for group in updater.groups:
            group.log_eta.fill_(eta).log_()


@torch.no_grad()
def _one(
    rollout: Rollout, request: EditRequest, watched: Sequence[Pair]
) -> tuple[float, float, float]:
    """(success, passes, KL) of an edit in full, which is taken back."""
    env = rollout.env  # an answer to a paraphrase has to carry over from the prompt:
    bare = dataclasses.replace(request, heldout=(*request.heldout, *request.paraphrases))
    near = [(place.prompt, place.answer) for place in request.locality if place.answer]
    try:
        with torch.enable_grad():
            outcome = rollout.propose(EditBatch((bare,)))
        rows = [(p, request.target) for p in (request.prompt, *request.paraphrases[:2])]
        said = env.answers(_encoded(env.backbone, rows))
        right = mean_by_row(answer_hits(said).float(), said) == 1
        tokens = _encoded(env.backbone, [*near, *watched])
        before = env.backbone.answers(tokens).logits.float().log_softmax(-1)
        kl = answer_kl(env.answers(tokens), before).mean()
        return float(right.float().mean()), float(outcome.passes), float(kl)
    finally:
        env.drop()


def _encoded(backbone: Backbone, pairs: Sequence[Pair]) -> TokenBatch:
    return encode(backbone.tokenizer, list(pairs), padding_side="left").to(backbone.device)


def _batches(backbone: Backbone, pairs: Sequence[Pair], size: int = BATCH) -> Iterator[TokenBatch]:
    for at in range(0, len(pairs), size):
        yield _encoded(backbone, pairs[at : at + size])
