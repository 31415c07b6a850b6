"""Building a method's parts from its configuration, ready to edit or to train."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hiedit.backbone.model import Backbone
from hiedit.config import MethodConfig, TrainConfig, from_mapping
from hiedit.data.neutral import NEUTRAL
from hiedit.durable import replacing, write_text
from hiedit.knowledge.fitting import (
    fit_power,
    fit_protection,
    own_pairs,
    phrasings_of,
    preserved_pairs,
)
from hiedit.policy.selectors import Selector, top_k_mask
from hiedit.rl.effects import best_subset, single_module_effects
from hiedit.rl.environment import Environment
from hiedit.rl.learner import Learner
from hiedit.rl.objective import Objective
from hiedit.rl.preserved import Preserved, known_pairs
from hiedit.rl.rollout import Rollout
from hiedit.rl.sequences import EditSequences, as_tensor, draw_contexts, from_tensor
from hiedit.rl.training import Trainer
from hiedit.types import EditBatch, EditRequest
from hiedit.updaters.updater import Updater

PRESERVED = "preserved.pairs"  # among an editor's tensors: prompts that its edits ask
CONTEXTS = "contexts.texts"  # the same: what it edits behind


@dataclass(frozen=True)
class Method:
    """The parts of one method around one environment."""

    config: MethodConfig
    rollout: Rollout

    @property
    def learned(self) -> bool:
        return self.config.trains

    def trainer(self, config: TrainConfig, seed: int = 0) -> Trainer:
        """A trainer over these parts."""
        rollout = self.rollout
        if rollout.selector.scores_masks and config.n_edits > 1:
            raise ValueError(
                f"train.n_edits={config.n_edits}: estimator="
                f"{self.config.selector.estimator!r} scores the masks of one edit at a time; set "
                "train.n_edits=1, or method.selector.estimator=straight_through"
            )
        objective = Objective(self.config.objective, rollout.env.backbone.tokenizer, seed)
        learner = Learner(rollout.selector, rollout.updater, config.clip, config.steps_per_update)
        return Trainer(rollout, objective, learner)


def build_method(
    backbone: Backbone,
    config: MethodConfig,
    train: Sequence[EditRequest] = (),
    preserve: Sequence[tuple[str, str]] = (),
    seed: int = 0,
) -> Method:
    """The method's parts: seeded, protection fitted on ``preserve`` (prompt, answer) pairs or the
    unrelated prompts of ``train``, single-module effects measured on ``train`` where wanted.

    Raises:
        ValueError: if the method needs training edits or prompts to preserve and has none.
    """
    config = backbone.place.fill(config)
    frequency = None
    if config.selector.kind == "static_frequency":  # before anything that takes time
        frequency = recorded_choices(config.selector.source, backbone.names)
    method = _empty(backbone, config, seed)
    if config.updater.contexts:
        method.rollout.contexts = draw_contexts(backbone, config.updater.contexts, seed)
    env, selector, updater = method.rollout.env, method.rollout.selector, method.rollout.updater
    protects = config.updater.protects
    if protects or config.passes.preserved:
        pairs = preserved_pairs(config, train, preserve)
    if protects:
        facts = phrasings_of(train, config) if config.updater.phrasing else ()
        fit_protection(backbone, updater, pairs, facts, own_pairs(backbone, config))
    if updater.wants_power:
        fit_power(backbone, updater, preserve or NEUTRAL)
    if config.passes.preserved:
        known = known_pairs(backbone, pairs, config.passes.preserved_probability)
        method.rollout.preserved = Preserved(known, config.passes)
    if frequency is not None:
        selector.set_static(top_k_mask(frequency[None], selector.k)[0])
    searches = config.selector.kind == "best_subset"
    if selector.wants_effects or searches:
        if not train:
            raise ValueError(
                f"method {config.name!r} starts from single-module effects and needs training "
                "edits to measure them on"
            )
        sample = list(train)[: config.selector.effect_edits]
        if searches:
            selector.set_static(best_subset(env, updater, sample, selector.k))
        else:
            selector.set_effects(single_module_effects(env, updater, sample))
    return method


@torch.no_grad()
def record_choices(method: Method, requests: Sequence[EditRequest]) -> None:
    """Note how often a policy chooses each module for ``requests`` on the unedited model, as it
    would while editing, for ``static_frequency``; it is saved with the editor."""
    rollout = method.rollout
    selector, env = rollout.selector, rollout.env
    if not selector.learned or not requests:
        return
    backbone, chosen = env.backbone, torch.zeros_like(selector.frequency)
    subject = rollout.updater.config.tokens == "subject"
    sequences = EditSequences(backbone.tokenizer, phrasings=False, subject=subject)
    for request in requests:
        tokens = sequences.encode(EditBatch((request,))).to(backbone.device)
        signals = rollout.told(env.probe(tokens, 1, rollout.updater.config.tokens).signals())
        chosen += selector.mode(selector.gate(signals, 1))[0]
    selector.frequency.copy_(chosen / len(requests))


def recorded_choices(source: str | Path, modules: Sequence[str]) -> Tensor:
    """[L]: what ``record_choices`` noted in the trained editor at ``source``.

    Raises:
        ValueError: if there is none, it is of other modules, or has no trained policy.
    """
    config = read_editor(source, modules)
    found = {}
    if config.selector.learned:
        try:
            found = load_file(Path(source) / "editor.safetensors")
        except SafetensorError as error:
            what = " ".join(str(error).split())
            raise ValueError(f"{source}/editor.safetensors is damaged: {what}") from None
    frequency = found.get("selector.frequency")
    if frequency is None or not bool(frequency.any()):
        raise ValueError(
            f"method.selector.source={str(source)!r}: {config.name!r} has no recorded choices of a "
            "policy; give the editor of a trained policy (RUN_DIR/editors/...)"
        )
    return frequency


def _empty(backbone: Backbone, config: MethodConfig, seed: int) -> Method:
    config = backbone.place.fill(config)
    torch.manual_seed(seed)
    groups = backbone.shape_groups()
    updater = Updater(backbone.names, groups, config.updater).to(backbone.device)
    selector = Selector(backbone.names, groups, config.selector, seed).to(backbone.device)
    return Method(config, Rollout(Environment(backbone), selector, updater, config.passes))


def save_editor(method: Method, directory: str | Path) -> Path:
    """Write a trained editor: ``editor.safetensors`` (policy, hypernetwork, normalisers,
    protection, preserved prompts) and ``method.json`` (its composition and its modules)."""
    names = method.rollout.updater.names
    return write_editor(directory, method.config, names, editor_tensors(method))


def editor_tensors(method: Method) -> dict[str, Tensor]:
    """Return what a trained editor consists of, by name."""
    tensors = {
        f"{part}.{name}": value.contiguous()
        for part, module in _parts(method).items()
        for name, value in module.state_dict().items()
    }
    preserved, contexts = method.rollout.preserved, method.rollout.contexts
    if preserved.pairs:
        tensors[PRESERVED] = preserved.as_tensor()
    return tensors | ({CONTEXTS: as_tensor(contexts)} if contexts else {})


def write_editor(
    directory: str | Path,
    config: MethodConfig,
    modules: Sequence[str],
    tensors: Mapping[str, Tensor],
) -> Path:
    """``save_editor`` for whoever has the tensors (``editor_tensors``) and not the model."""
    directory = Path(directory)
    about = {"format": 1, "modules": list(modules), "method": dataclasses.asdict(config)}
    (directory / "method.json").unlink(missing_ok=True)  # it is never beside others' tensors
    with replacing(directory / "editor.safetensors") as temporary:
        save_file(dict(tensors), temporary)
    write_text(directory / "method.json", json.dumps(about, indent=1) + "\n")
    return directory


def load_editor(backbone: Backbone, directory: str | Path, seed: int = 0) -> Method:
    """The trained editor that ``save_editor`` wrote, around ``backbone``.

    Raises:
        ValueError: if the directory holds none, or it was trained for other modules.
    """
    config = read_editor(directory, backbone.names)
    try:
        tensors = load_file(Path(directory) / "editor.safetensors")
        return editor_of(backbone, config, tensors, seed)
    except (SafetensorError, RuntimeError) as error:
        what = " ".join(str(error).split())
        raise ValueError(f"{directory}/editor.safetensors does not fit: {what}") from None


def editor_of(
    backbone: Backbone, config: MethodConfig, tensors: Mapping[str, Tensor], seed: int = 0
) -> Method:
    """The trained editor whose ``editor_tensors`` these are; RuntimeError if they do not fit."""
    method = _empty(backbone, config, seed)
    for part, module in _parts(method).items():
        prefix = f"{part}."
        state = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
        if part == "selector" and method.rollout.selector.learned:  # older ones lack it
            state.setdefault("frequency", module.frequency)
        module.load_state_dict(state)
    if PRESERVED in tensors:
        pairs = Preserved.pairs_in(tensors[PRESERVED])
        method.rollout.preserved = Preserved(pairs, config.passes)
    if CONTEXTS in tensors:
        method.rollout.contexts = from_tensor(tensors[CONTEXTS])
    method.rollout.updater.reset()
    return method


def read_editor(directory: str | Path, modules: Sequence[str]) -> MethodConfig:
    """The composition of the trained editor in ``directory``, without its tensors.

    Raises:
        ValueError: if the directory holds none, or it was trained for other modules.
    """
    trained, values = _about(directory)
    if trained != list(modules):
        raise ValueError(
            f"{directory} was trained for the modules {trained}; "
            f"the model's editable ones are {list(modules)}"
        )
    return from_mapping(MethodConfig, values, "method")


def trained_modules(directory: str | Path) -> list[str]:
    """The modules that the trained editor in ``directory`` edits; raises as ``read_editor``."""
    return _about(directory)[0]


def _about(directory: str | Path) -> tuple[list[str], dict]:
    """The modules and the composition of a trained editor."""
    directory = Path(directory)
    about_path = directory / "method.json"
    if not about_path.exists() or not (directory / "editor.safetensors").exists():
        raise ValueError(f"{directory} holds no trained editor (method.json, editor.safetensors)")
    try:
        about = json.loads(about_path.read_text(encoding="utf-8"))
        return about["modules"], about["method"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{about_path} is damaged: {error!r}") from None


def _parts(method: Method) -> dict[str, torch.nn.Module]:
    return {"selector": method.rollout.selector, "updater": method.rollout.updater}
