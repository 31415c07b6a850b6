"""A lifelong trajectory, run in segments: the edits between two versions of the parameters.

    stream -> EditBatch -> Rollout (every pass rewarded) -> gradients for the learner, TrainSteps

The same code trains in one process and on many: who takes the gradients differs, nothing else.
What a trajectory carries from one segment to the next is its ``state``, all of it: restored
elsewhere it goes on with the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from hiedit.config import TrainConfig
from hiedit.data.tokens import encode
from hiedit.rl.candidates import policy_loss, score_masks
from hiedit.rl.checkpoint import Snapshot
from hiedit.rl.objective import Objective, Rows
from hiedit.rl.options import score_options
from hiedit.rl.reference import Pair
from hiedit.rl.rollout import Rollout
from hiedit.types import Action, EditBatch, EditRequest, Shifts, Signals
from hiedit.updaters.memory import lifelong_state, load_lifelong_state

Backward = Callable[[Tensor], None]
MaskScore = Callable[[Tensor], Tensor]  # masks [C, L] -> losses [C]


@dataclass(frozen=True)
class TrainStep:
    """One training edit, as the tracker and the plots see it.

    edit: edits so far. stream: number of the stream. loss, paraphrase, locality, size: of the
    reward, means over the passes (nats; size as configured). layers: modules touched. passes:
    shifts computed. held: the edit reached the target probability. seconds: since the start.
    """

    edit: int
    stream: int
    loss: float
    paraphrase: float
    locality: float
    size: float
    layers: float
    passes: int
    held: bool
    seconds: float


def growing_streams(
    requests: tuple[EditRequest, ...], config: TrainConfig, seed: int
) -> Iterator[tuple[int, EditBatch, bool]]:
    """(stream number, step, whether a new stream begins here), ``config.edits`` requests in all.

    Streams are of the configured lengths in turn, the last length repeating; requests are drawn
    in a fresh order whenever they run out.

    Raises:
        ValueError: if there is no request to draw.
    """
    if not requests:
        raise ValueError("train: there are no training edits; give training records")
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    done, stream = 0, 0
    while done < config.edits:
        length = config.stream_lengths[min(stream, len(config.stream_lengths) - 1)]
        length = min(length, config.edits - done)
        for first in range(0, length, config.n_edits):
            size = min(config.n_edits, length - first)
            while len(order) < size:
                order += torch.randperm(len(requests), generator=generator).tolist()
            chosen, order = order[:size], order[size:]
            yield stream, EditBatch(tuple(requests[i] for i in chosen), done), first == 0
            done += size
        stream += 1


def train_edit(
    rollout: Rollout,
    objective: Objective,
    backward: Backward,
    batch: EditBatch,
    stream: int = 0,
    start: float = 0.0,
) -> TrainStep:
    """One training edit: every pass is rewarded on its own, ``backward`` gets its loss."""
    env = rollout.env
    rewarded = objective.batch(batch, env.backbone.device)
    env.backbone.warm(rewarded.tokens)
    reference = objective.reference(env, rewarded)
    rewards = []

    def on_pass(signals: Signals, action: Action) -> Shifts:
        updater, selector = rollout.updater, rollout.selector
        shifts = updater(signals, action.mask, every=selector.learned)
        in_gate = selector.config.size_in_gate
        energy = updater.energy(shifts, in_gate)
        reward = objective(env, rewarded, reference, shifts, energy, in_gate)
        loss = reward.loss
        once = selector.config.credit_over == "option"  # the first pass's credit is of them all
        if action.draws is not None and not (once and rewards):
            score = _score(rollout, objective, batch, rewarded, reference, shifts)
            loss = loss + policy_loss(selector, action, score)
        backward(loss)
        rewards.append(reward)
        return shifts

    outcome = rollout.step(batch, on_pass)
    objective.remember(batch)
    count = len(rewards) or float("nan")  # an edit that held from the start has no reward
    return TrainStep(
        edit=batch.first + len(batch),
        stream=stream,
        loss=sum(float(r.loss.detach()) for r in rewards) / count,
        paraphrase=sum(float(r.edit) for r in rewards) / count,
        locality=sum(float(r.locality) for r in rewards) / count,
        size=sum(float(r.size) for r in rewards) / count,
        layers=float(outcome.mask.sum(-1).mean()),
        passes=outcome.passes,
        held=outcome.held,
        seconds=time.perf_counter() - start,
    )


def _score(rollout, objective, batch, rewarded, reference, shifts: Shifts) -> MaskScore:
    """Return what ``policy_loss`` scores masks by: this pass's shifts, or the whole option."""
    config = rollout.selector.config
    if config.credit_over == "option":
        return partial(score_options, rollout, objective.config, batch, rewarded, reference)
    given = rollout.env, rollout.updater, objective.config, rewarded, reference, shifts
    target = rollout.passes.target_probability
    return partial(score_masks, *given, target=target, size=config.size_in_gate)


class Trajectory:
    """One worker's streams of training edits, from the first request to the last.

    position, edits: batches and edits so far. The parameters of updater and selector belong to the
    learner and are no part of the state; nor are the running statistics.
    """

    def __init__(
        self,
        rollout: Rollout,
        objective: Objective,
        requests: tuple[EditRequest, ...],
        config: TrainConfig,
        seed: int,
    ):
        self.rollout, self.objective = rollout, objective
        self.position = self.edits = 0
        self._source = (requests, config, seed)
        self._streams = growing_streams(*self._source)
        self._carry()

    def run(
        self,
        steps: int,
        backward: Backward,
        on_step: Callable[[TrainStep], bool | None] = lambda step: None,
        start: float = 0.0,
    ) -> list[TrainStep]:
        """Up to ``steps`` batches of edits, fewer at the end of the streams or where ``on_step``
        returns True after one of them."""
        done = []
        for stream, batch, begins in islice(self._streams, steps):
            self.position += 1
            if begins:
                self.rollout.reset()
                self.objective.reset()
            step = train_edit(self.rollout, self.objective, backward, batch, stream, start)
            self.edits = step.edit
            done.append(step)
            if on_step(step):
                break
        self._carry()
        return done

    def state(self, copy: bool = True) -> Snapshot:
        """All that the next segment depends on, apart from what the learner publishes. Without
        ``copy`` the large tensors are the trajectory's own, to be read before its next edit."""
        rollout, objective = self.rollout, self.objective
        prefix, known = self._prefix(), objective.references.known(self._local())
        tensors = {f"acc.{n}": a for n, a in rollout.env.state.accumulated().items()}
        memory = lifelong_state(rollout.updater)
        tensors |= {f"memory.{n}": t for n, t in memory.items() if n.endswith(".precision")}
        tensors |= {f"prefix.{i}": t for i, t in enumerate(prefix.values())}
        tensors |= {f"known.{i}": t for i, t in enumerate(known.values())}
        tensors["random.torch"] = torch.get_rng_state()
        tensors["random.selector"] = rollout.selector.generator.get_state()
        version, numbers, gauss = objective.random.getstate()
        values = {
            "position": self.position,
            "edits": self.edits,
            "commits": rollout.env.state.edits,
            "past": [[list(rows.edit), list(rows.local)] for rows in objective.past],
            "prefix": list(prefix),
            "known": list(known),
            "random": [version, list(numbers), gauss],
        }
        tensors = {n: t.detach().cpu() for n, t in tensors.items()}
        return Snapshot({n: t.clone() for n, t in tensors.items()} if copy else tensors, values)

    def load_state(self, state: Snapshot) -> None:
        """Go on where ``state`` was taken, on any replica of the same model.

        Raises:
            ValueError: if it is of another model; the replica is then the unedited one.
        """
        tensors, values, rollout = state.tensors, state.values, self.rollout
        self.position, self.edits = values["position"], values["edits"]
        self._streams = islice(growing_streams(*self._source), self.position, None)
        rollout.reset()
        load_lifelong_state(rollout.updater, _below("memory.", tensors))
        acc = _below("acc.", tensors)
        rollout.env.state.rebuild(acc, (), start=acc)
        rollout.env.state.edits = values["commits"]
        rollout.selector.generator.set_state(tensors["random.selector"])
        torch.set_rng_state(tensors["random.torch"])
        self._load_objective(tensors, values)
        cache, device = rollout.env.backbone.prefix.cache, rollout.env.backbone.device
        cache.clear()
        for i, key in enumerate(values["prefix"]):
            cache.put(tuple(key), tensors[f"prefix.{i}"].to(device))

    def _load_objective(self, tensors, values) -> None:
        objective, env = self.objective, self.rollout.env
        objective.reset()
        for edit, local in values["past"]:
            objective.past.append(Rows(_pairs(edit), _pairs(local)))
        version, numbers, gauss = values["random"]
        objective.random.setstate((version, tuple(numbers), gauss))
        known = {
            tuple(pair): tensors[f"known.{i}"].to(env.backbone.device)
            for i, pair in enumerate(values["known"])
        }
        objective.references.load(env, known)

    def _carry(self) -> None:
        """Keep, of what was computed before, what the earlier edits in reach will ask for again.

        How a sum rounds can depend on what it was computed together with, so what is kept is part
        of the state; this much of it is small, and hardly anything else is asked for twice.
        """
        env = self.rollout.env
        self.objective.references.keep(env, self._local())
        cache, kept = env.backbone.prefix.cache, self._prefix()
        cache.clear()
        for key, value in kept.items():
            cache.put(key, value)

    def _prefix(self) -> dict[tuple[int, ...], Tensor]:
        """Return, by the tokens of a sequence, what is kept of it below the lowest editable
        module."""
        backbone = self.rollout.env.backbone
        pairs = [pair for rows in self.objective.past for pair in (*rows.edit, *rows.local)]
        if not pairs or not len(backbone.prefix.cache):
            return {}
        tokens = encode(backbone.tokenizer, pairs, padding_side="left")
        keys = [
            tuple(ids[kept].tolist())
            for ids, kept in zip(tokens.ids, tokens.attention.bool(), strict=True)
        ]
        found = {key: backbone.prefix.cache.get(key) for key in dict.fromkeys(keys)}
        return {key: value for key, value in found.items() if value is not None}

    def _local(self) -> list[Pair]:
        """The unrelated prompts of the earlier edits in reach."""
        return [pair for rows in self.objective.past for pair in rows.local]


def _below(prefix: str, tensors) -> dict[str, Tensor]:
    return {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}


def _pairs(rows) -> tuple[tuple[str, str], ...]:
    return tuple((prompt, answer) for prompt, answer in rows)
