"""A world in which different kinds of knowledge live in different layers, by construction.

    packaged world -> switches -> facts of each group, learned by its own layers -> checked by reset

The facts are of invented subjects. Every prompt of a group ends in the group's sign, which closes
the MLPs of all other editable layers (switches.py): what such a prompt is answered with can only
come from the group's own layers. Training takes the groups by turns; a group's step moves the
editable projections (gate and up) of its own layers and nothing else, mixes in facts of the world
so that those stay, and sees the other groups' layers now as installed, now as they were, so that
no group comes to lean on another. The truth is measured as well: with one group's layers as they
were, its facts must be gone and all others must be there.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hiedit.durable import write_text
from hiedit.types import EditRequest, Locality
from hiedit.world.corpus import Sentences, heldout_prompt, seen_prompts, sentences, tokenise
from hiedit.world.facts import Fact
from hiedit.world.fictional import EDITABLE, GROUPS, Group, fictional_answers, fictional_facts
from hiedit.world.lifelong import lifelong_stream
from hiedit.world.optim import Muon
from hiedit.world.recall import knows
from hiedit.world.requests import LOCALITY, request_of, split_facts, world_dir, world_facts
from hiedit.world.switches import install_switches
from hiedit.world.train import progress_bar, quiet_transformers, use_threads

TRAIN_SHARE = 0.55  # of each group's subjects
RESERVED_SHARE = 0.25  # of the training subjects: knowledge to protect, never edited
OTHER_LOCALITY = 2  # locality prompts per request about the real world


@dataclass(frozen=True)
class Installation:
    """The recipe by which facts are learned: Muon, constant and then falling; sentences per step of
    the group, of the world, and of each other installed group. mixed: how many sentences of the
    world there are to draw from; read: how many the directions for the switches are found on."""

    lr: float = 0.06
    batch: int = 64
    world_batch: int = 24
    other_batch: int = 24
    mixed: int = 2000
    read: int = 512


@dataclass(frozen=True)
class InstalledWorld:
    """A heterogeneous world on disk. all_facts: the invented ones, train and test."""

    directory: Path
    groups: tuple[Group, ...]
    all_facts: tuple[Fact, ...]
    seed: int

    @cached_property
    def truth(self) -> dict[str, tuple[str, ...]]:
        """Return, by relation, the modules that its facts were installed in."""
        return {r: tuple(modules_of(g)) for g in self.groups for r in g.relations}

    def group_of(self, relation: str) -> str:
        return next(g.name for g in self.groups if relation in g.relations)

    @cached_property
    def reserved(self) -> frozenset[str]:
        """Training subjects whose facts are protected and never edited."""
        subjects = sorted({f.subject for f in self._half("train")})
        rng = random.Random(f"reserved/{self.seed}")
        return frozenset(rng.sample(subjects, int(len(subjects) * RESERVED_SHARE)))

    @cached_property
    def preserve(self) -> tuple[tuple[str, str], ...]:
        """(prompt, answer) of the reserved facts, in seeded order."""
        pairs = sentences([f for f in self._half("train") if f.subject in self.reserved])
        random.Random(f"preserve/{self.seed}").shuffle(pairs)
        return tuple(pairs)

    def facts(self, split: str) -> tuple[Fact, ...]:
        """Facts that may be edited: ``train`` (without the reserved ones) or ``test``."""
        half = self._half(split)
        return tuple(f for f in half if f.subject not in self.reserved)

    def _half(self, split: str) -> tuple[Fact, ...]:
        chosen: set[str] = set()
        for group in self.groups:
            subjects = sorted({f.subject for f in self.all_facts if f.relation in group.relations})
            rng = random.Random(f"split/{self.seed}/{group.name}")
            chosen |= set(rng.sample(subjects, int(len(subjects) * TRAIN_SHARE)))
        return tuple(f for f in self.all_facts if (f.subject in chosen) == (split == "train"))


def modules_of(group: Group) -> list[str]:
    """The editable modules that the group's facts are installed in."""
    kinds = ("gate_proj", "up_proj")
    return [f"model.layers.{layer}.mlp.{kind}" for layer in group.layers for kind in kinds]


def installed_requests(world: InstalledWorld, facts: Sequence[Fact]) -> tuple[EditRequest, ...]:
    """A counterfactual training edit for each of ``facts``, in seeded order."""
    order = random.Random(f"installed/{world.seed}").sample(list(facts), len(facts))
    pool = tuple(sorted(facts))
    return tuple(
        _with_world(
            request_of(f, pool, {f}, 0, LOCALITY, fictional_answers(f.relation, world.seed)),
            "train",
        )
        for f in order
    )


def installed_stream(
    world: InstalledWorld, facts: Sequence[Fact], n: int, seed: int
) -> tuple[EditRequest, ...]:
    """``n`` edits drawn from all groups; locality also asks about the real world."""

    def answers(relation: str) -> Sequence[str]:
        return fictional_answers(relation, world.seed)

    stream = lifelong_stream(facts, n, seed, LOCALITY, answers)
    return tuple(_with_world(request, "test", seed) for request in stream)


def _with_world(request: EditRequest, split: str, seed: int = 0) -> EditRequest:
    rng = random.Random(f"near/{seed}/{request.prompt}")
    near = rng.sample(split_facts(split), OTHER_LOCALITY)
    more = tuple(Locality(rng.choice(seen_prompts(f)), f.answer) for f in near)
    return replace(request, locality=(*request.locality, *more))


def read_heterogeneous(directory: str | Path) -> InstalledWorld:
    """Return what ``build_heterogeneous`` wrote.

    Raises:
        ValueError: if there is none.
    """
    path = Path(directory) / "heterogeneous.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no heterogeneous world there ({error})") from None
    groups = tuple(
        Group(g["name"], tuple(g["layers"]), tuple(g["relations"]), g["sign"])
        for g in about["groups"]
    )
    facts = fictional_facts(groups, about["subjects"], about["seed"])
    return InstalledWorld(Path(directory), groups, facts, about["seed"])


def build_heterogeneous(
    directory: str | Path,
    seed: int = 0,
    subjects: int = 150,
    steps: int = 700,
    groups: tuple[Group, ...] = GROUPS,
    recipe: Installation = Installation(),  # noqa: B008 (frozen, without state)
    progress: bool = True,
    asked: int = 800,
) -> dict:
    """Install the facts in the packaged world and write a checkpoint (fp32) to ``directory``.

    ``heterogeneous.json`` is written last: where it is, the world is whole.

    Args:
        directory: made if missing.
        seed: of names, facts, splits and the order of sentences.
        subjects: invented subjects a group, each with a fact per relation of its group.
        steps: of the optimiser, all groups together.
        groups, recipe: what is installed where, and how.
        asked: at most so many sentences of each kind when recall is measured.

    Returns:
        Its content; ``recall`` is by group, with each group's layers as they were in turn.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = Path(directory)
    with use_threads(1), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(world_dir())
        model = AutoModelForCausalLM.from_pretrained(world_dir(), dtype=torch.float32)
        facts = fictional_facts(groups, subjects, seed)
        signs = {g.sign: g.layers for g in groups}
        sample = random.Random(seed).sample(sentences(list(world_facts())), recipe.read)
        model.requires_grad_(False)
        install_switches(model, tokenizer, signs, EDITABLE, [prompt for prompt, _ in sample])
        work = _Installer(model, tokenizer, groups, facts, recipe, seed)
        work.run(steps, progress)
        recall = work.recall(asked)
        work.show(())
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    about = {
        "format": 1,
        "seed": seed,
        "subjects": subjects,
        "steps": steps,
        "recipe": asdict(recipe),
        "groups": [asdict(group) for group in groups],
        "modules": {group.name: modules_of(group) for group in groups},
        "loss": work.losses,
        "recall": recall,
    }
    write_text(directory / "heterogeneous.json", json.dumps(about, indent=1) + "\n")
    return about


class _Installer:
    """The model in training: each group's weights as they were and as installed so far."""

    def __init__(self, model, tokenizer, groups, facts, recipe: Installation, seed: int):
        self.model, self.tokenizer, self.groups = model, tokenizer, groups
        self.recipe, self.facts = recipe, facts
        self.data = {g.name: tokenise(sentences(self.of(g)), tokenizer) for g in groups}
        world = random.Random(f"mixed/{seed}").sample(sentences(list(world_facts())), recipe.mixed)
        self.data["world"] = tokenise(world, tokenizer)
        # Below the lowest installed layer nothing changes: computed once.
        self.depth = min(layer for g in groups for layer in g.layers)
        self.states = {name: self._below(data) for name, data in self.data.items()}
        named = dict(model.named_parameters())
        self.params = {g.name: [named[f"{m}.weight"] for m in modules_of(g)] for g in groups}
        self.before = {g: [p.detach().clone() for p in ps] for g, ps in self.params.items()}
        self.now = {g: [p.detach().clone() for p in ps] for g, ps in self.params.items()}
        self.optimizers = {g: Muon(ps, lr=recipe.lr) for g, ps in self.params.items()}
        self.generator = torch.Generator().manual_seed(seed)
        self.losses: dict[str, float] = {}

    def of(self, group: Group) -> list[Fact]:
        return [f for f in self.facts if f.relation in group.relations]

    @torch.no_grad()
    def _below(self, data: Sentences) -> Tensor:
        """[N, S, H]: what enters layer ``depth``; padding is on the right and does no harm."""
        parts = [
            self.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[
                self.depth
            ]
            for ids in data.ids.split(128)
        ]
        return torch.cat(parts)

    def run(self, steps: int, progress: bool) -> None:
        with progress_bar(steps, progress, "installing facts") as advance:
            for step in range(steps):
                group = self.groups[step % len(self.groups)]
                for options in self.optimizers[group.name].param_groups:
                    options["lr"] = self.recipe.lr * min(1.0, 2 * (1 - step / steps))
                self.losses[group.name] = self._step(group)
                advance(self.losses[group.name])

    def show(self, reset: Sequence[str]) -> None:
        """The model with the groups ``reset`` as they were and the others as installed."""
        for name, parameters in self.params.items():
            source = self.before if name in reset else self.now
            for parameter, value in zip(parameters, source[name], strict=True):
                parameter.data.copy_(value)

    def _step(self, group: Group) -> float:
        others = [g.name for g in self.groups if g is not group]
        draws = torch.rand(len(others), generator=self.generator).tolist()
        off = [name for name, draw in zip(others, draws, strict=True) if draw < 0.5]
        self.show(off)
        parameters = self.params[group.name]
        for parameter in parameters:
            parameter.requires_grad_(True)
        r = self.recipe
        loss = self._loss(group.name, r.batch)
        loss.backward()
        self._loss("world", r.world_batch).backward()
        for name in others:
            if name not in off:
                self._loss(name, r.other_batch).backward()
        self.optimizers[group.name].step()
        self.optimizers[group.name].zero_grad(set_to_none=True)
        for parameter in parameters:
            parameter.requires_grad_(False)
        self.now[group.name] = [p.detach().clone() for p in parameters]
        return float(loss.detach())

    def _loss(self, name: str, count: int) -> Tensor:
        """Cross-entropy of answers and ends, nats per token."""
        data: Sentences = self.data[name]
        rows = torch.randint(len(data.length), (count,), generator=self.generator)
        width = int(data.length[rows].max())
        ids = data.ids[rows, :width]
        where = data.weight[rows, 1:width] == 1
        states = self.states[name][rows, :width]
        inner = self.model.model
        layers = inner.layers
        inner.layers = layers[self.depth :]
        try:
            logits = self.model(inputs_embeds=states, use_cache=False).logits[:, :-1]
        finally:
            inner.layers = layers
        return F.cross_entropy(logits[where], ids[:, 1:][where])

    @torch.no_grad()
    def recall(self, asked: int) -> dict[str, dict[str, float]]:
        """Return, by what is reset (``nothing``, a group): recall of each group's and the world's
        facts, ``asked`` sentences of each."""
        pairs = {g.name: sentences(self.of(g)) for g in self.groups}
        pairs["world"] = sentences(list(world_facts()))
        pairs = {k: random.Random(0).sample(v, min(asked, len(v))) for k, v in pairs.items()}
        table = {}
        for reset in ("nothing", *(g.name for g in self.groups)):
            self.show((reset,))
            table[reset] = {name: self._known(rows) for name, rows in pairs.items()}
        self.show(())
        heldout = {
            g.name: self._known([(heldout_prompt(f), f.answer) for f in self.of(g)])
            for g in self.groups
        }
        return table | {"nothing, held-out phrasing": heldout}

    def _known(self, pairs: list[tuple[str, str]]) -> float:
        return round(float(knows(self.model, self.tokenizer, pairs).float().mean()), 4)
