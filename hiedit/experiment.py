"""One run from configuration to results: model, records, method, training, lifelong evaluation.

    RunConfig -> load_backbone + load_data -> build_method -> train -> run_stream -> MethodResult

The entry points (`launch/train.py`, `hiedit demo`, `hiedit evaluate`) are thin shells over this.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hiedit.backbone.model import Backbone
from hiedit.config import EvaluateConfig, MethodConfig, Place, TrainConfig
from hiedit.data.records import load_records
from hiedit.data.stream import EditStream, StreamConfig, splits
from hiedit.evaluation.lifelong import StreamProbe, run_stream, with_training
from hiedit.evaluation.metrics import SILENCE, generate
from hiedit.evaluation.results import MethodResult
from hiedit.guard import Guard, GuardedRollout
from hiedit.hub import check_hub
from hiedit.methods import Method, build_method, record_choices
from hiedit.models import WORLD, resolve
from hiedit.rl.checkpoint import Checkpoints
from hiedit.rl.training import TrainStep
from hiedit.runconfig import DatasetConfig, ModelConfig
from hiedit.types import EditRequest
from hiedit.world import split_facts, world_requests, world_stream
from hiedit.world.preserve import preservation_pairs

KNOWN = "known"  # a dataset that a run makes by asking its model, see hiedit/known.py
PRESERVE = "preserve.json"  # beside train.json and stream.json: knowledge to protect


@dataclass(frozen=True)
class Data:
    """train: requests to train an editor on. stream: the held-out stream, in order. preserve:
    (prompt, answer) pairs of knowledge to protect. skipped: malformed rows left out."""

    train: tuple[EditRequest, ...]
    stream: tuple[EditRequest, ...]
    preserve: tuple[tuple[str, str], ...]
    skipped: int = 0


@dataclass(frozen=True)
class Hooks:
    """Functions that a run reports its progress to; every function may be left out. ``trained`` is
    given the method between training and the stream, whose statistics are no part of a trained
    editor."""

    train: Callable[[TrainStep, int], None] = lambda step, total: None
    edit: Callable[[int, int], None] = lambda done, total: None
    stage: Callable[[str], None] = lambda name: None
    trained: Callable[[Method], None] = lambda method: None


def model_path(path: str) -> str:
    """The directory of a model of ``hiedit models`` (``world``: the embedded one) or of a GGUF
    file; everything else is itself.

    Raises:
        ValueError: for a model that is not here or a file that is none, with what to do.
    """
    return resolve(path)


def load_backbone(config: ModelConfig) -> Backbone:
    """The model and tokenizer of ``config`` with its editable modules.

    Module names are checked against the architecture before any weight is read.

    Raises:
        ValueError: if the path holds no model or a module is unknown.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    path = model_path(config.path)
    check_modules(config)
    if path != config.path or Path(path).is_dir():  # a bar for a local file is noise
        disable_progress_bar()
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    trust = config.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=trust)
    host = config.edits_on == "host"
    backbone = Backbone(model.to(device), tokenizer, config.modules, edits_on_host=host)
    backbone.place = place_of(config)
    return backbone


def place_of(config: ModelConfig) -> Place:
    """Return where edits act on the model that ``config`` names."""
    usual = Place("answer", 0) if config.path == WORLD else Place()
    tokens = usual.tokens if config.tokens is None else config.tokens
    return Place(tokens, usual.contexts if config.contexts is None else config.contexts)


def is_editor(path: str) -> bool:
    """Tell whether ``path`` is the directory of a trained editor."""
    return (Path(path) / "method.json").is_file()


def check_modules(config: ModelConfig) -> list[str]:
    """The editable modules that ``config`` names, from the model's config alone (no weights).

    Raises:
        ValueError: if the path holds no model, or a module is unknown.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from hiedit.backbone.modules import resolve_modules

    path = model_path(config.path)
    check_hub(path)
    try:
        architecture = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"model.path={config.path!r}: no model there ({first}); give a directory that holds "
            "config.json, a GGUF file, a hub name, 'world', or another name of `hiedit models`"
        ) from None
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(
            architecture, trust_remote_code=config.trust_remote_code
        )
    return list(resolve_modules(empty, config.modules))


def load_data(dataset: DatasetConfig, stream: StreamConfig, seed: int = 0) -> Data:
    """Training requests, the held-out stream, and knowledge to preserve.

    Raises:
        ValueError: on malformed records, or a stream longer than its records.
    """
    if dataset.path == WORLD:
        return _world_data(stream, seed)
    if dataset.path == KNOWN:
        raise ValueError(
            "dataset.path='known': the model is asked by a run in one process or on Ray with whole "
            "replicas; its RUN_DIR/known is then a dataset.path for any other"
        )
    path = Path(dataset.path)
    skipped = 0
    if path.is_dir() or dataset.stream_path:
        train_path = path / "train.json" if path.is_dir() else path
        stream_path = Path(dataset.stream_path or path / "stream.json")
        train, skipped = _records(train_path, dataset)
        held, more = _records(stream_path, dataset)
        skipped += more
    else:
        records, skipped = _records(path, dataset)
        shares = (stream.train_share, 1 - stream.train_share)
        train, held = splits(records, shares, stream.seed)
    chosen = EditStream(held, stream).requests
    own = _kept(path / PRESERVE) if (path / PRESERVE).is_file() else ()
    preserve = own or knowledge_in(train, chosen)
    if not dataset.subjects:
        train, chosen = (
            tuple(dataclasses.replace(r, subject=None) for r in x) for x in (train, chosen)
        )
    return Data(tuple(train), chosen, preserve, skipped)


def knowledge_in(
    train: Sequence[EditRequest], stream: Sequence[EditRequest]
) -> tuple[tuple[str, str], ...]:
    """Return what the records of ``train`` say of things as they are, as (prompt, answer): their
    unrelated prompts, then what their own prompts had for an answer. Nothing that ``stream`` asks
    is among it: what is measured must not have been protected by name."""
    asked = {p for r in stream for p in (r.prompt, *r.paraphrases, *r.heldout)}
    asked |= {place.prompt for r in stream for place in r.locality}
    near = [(p.prompt, p.answer) for r in train for p in r.locality if p.answer]
    own = [(r.prompt, r.old_target) for r in train if r.old_target]
    return tuple({p: answer for p, answer in (*near, *own) if p not in asked}.items())


def _kept(path: Path) -> tuple[tuple[str, str], ...]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return tuple((str(prompt), str(answer)) for prompt, answer in rows)
    except (ValueError, TypeError):
        raise ValueError(f"{path}: it must be a list of [prompt, answer] pairs") from None


def _records(path: Path, dataset: DatasetConfig) -> tuple[tuple[EditRequest, ...], int]:
    records = load_records(path, schema=dataset.schema, skip_bad_rows=dataset.skip_bad_rows)
    return records.requests, records.skipped_rows


def _world_data(stream: StreamConfig, seed: int) -> Data:
    length = len(split_facts("test")) if stream.length is None else stream.length
    held = world_stream("test", length, seed=stream.seed)
    held = EditStream(held, dataclasses.replace(stream, shuffle=False)).requests  # checks n_edits
    preserve, reserved = preservation_pairs(seed=0)
    train = [r for r in world_requests("train", seed=seed) if r.subject not in reserved]
    return Data(tuple(train), tuple(held), preserve)


def complete_locality(
    backbone: Backbone, requests: Sequence[EditRequest], limit: int
) -> tuple[EditRequest, ...]:
    """``requests``, those of the first ``limit`` with the model's own greedy answer in place of
    every missing gold answer (FEVER has none); to be called before the first edit."""
    missing = {p.prompt for r in requests[:limit] for p in r.locality if not p.answer}
    prompts = sorted(missing)
    said = dict(zip(prompts, generate(backbone, prompts), strict=True))

    def completed(request: EditRequest) -> EditRequest:
        places = tuple(
            p if p.answer else dataclasses.replace(p, answer=said[p.prompt] or SILENCE)
            for p in request.locality
        )
        return dataclasses.replace(request, locality=places)

    return (*(completed(r) for r in requests[:limit]), *requests[limit:])


def training_requests(
    backbone: Backbone, data: Data, method: MethodConfig, train: TrainConfig, seed: int
) -> tuple[EditRequest, ...]:
    """Return what ``method`` trains on and protects by. Where gold answers are missing these are as
    many requests, drawn by ``seed``, as the training can use, each completed."""
    uses = method.trains or method.updater.protects
    if not uses or all(p.answer for r in data.train for p in r.locality):
        return data.train
    limit = min(max(train.edits, 256), len(data.train))
    return complete_locality(backbone, random.Random(seed).sample(data.train, limit), limit)


def train_method(
    backbone: Backbone,
    data: Data,
    method: MethodConfig,
    train: TrainConfig,
    seed: int = 0,
    hooks: Hooks = Hooks(),  # noqa: B008 (frozen, without state)
    trainer: Callable[[Method], Any] | None = None,
    checkpoints: Checkpoints | None = None,
) -> tuple[Method, list[TrainStep]]:
    """Build one method and train it, where there is something to learn; the model comes back
    unedited. ``trainer`` makes what trains it (by default its own, in this process), which writes
    and resumes ``checkpoints``."""
    hooks.stage("prepare")
    requests = training_requests(backbone, data, method, train, seed)
    preserve = data.preserve
    if method.trains:  # what is edited in training must not be kept as it is
        edited = {r.prompt for r in requests}
        preserve = tuple(pair for pair in preserve if pair[0] not in edited)
    parts = build_method(backbone, method, requests, preserve, seed)
    if not (parts.learned and train.edits):
        return parts, []
    hooks.stage("start" if trainer else "train")
    chosen = trainer(parts) if trainer else parts.trainer(train, seed)
    tell = functools.partial(hooks.train, total=train.edits)
    history = chosen.run(requests, train, seed, tell, checkpoints)
    record_choices(parts, requests[: method.selector.effect_edits])
    hooks.trained(parts)
    return parts, history


def run_method(
    backbone: Backbone,
    data: Data,
    probe: StreamProbe,
    method: MethodConfig | None,
    train: TrainConfig,
    evaluate: EvaluateConfig,
    seed: int = 0,
    n_edits: int = 1,
    hooks: Hooks = Hooks(),  # noqa: B008 (frozen, without state)
    ready: Method | None = None,
    trainer: Callable[[Method], Any] | None = None,
    checkpoints: Checkpoints | None = None,
) -> tuple[MethodResult, Method, list[TrainStep]]:
    """Build, train (see ``train_method``) and evaluate one method; the model comes back unedited.
    ``ready`` is a trained editor, evaluated as it is."""
    start = time.perf_counter()
    history: list[TrainStep] = []
    parts = ready
    if ready is None:
        parts, history = train_method(
            backbone, data, method, train, seed, hooks, trainer, checkpoints
        )
    spent = time.perf_counter() - start
    rollout = parts.rollout
    if evaluate.guard:
        rollout = GuardedRollout(rollout, Guard(), [prompt for prompt, _ in data.preserve])
    try:
        hooks.stage("edit")
        result = run_stream(
            rollout,
            probe,
            evaluate,
            method=parts.config.name,
            seed=seed,
            n_edits=n_edits,
            on_progress=hooks.edit,
        )
    finally:
        parts.rollout.reset()
    result = with_training(result, spent, history[-1].edit if history else 0)
    config = {"method": dataclasses.asdict(parts.config), "train": dataclasses.asdict(train)}
    rejected = rollout.rejected if evaluate.guard else None
    return dataclasses.replace(result, config=config, rejected=rejected), parts, history
