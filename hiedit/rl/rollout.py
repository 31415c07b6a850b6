"""One edit as an option: capture, choose, shift, check, until it holds; the same code edits a
deployed model and collects training passes.

    request -> Probe -> Signals -> Action + Shifts -> pending -> ... -> commit
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hiedit.backbone.losses import answer_confidence
from hiedit.config import PassesConfig
from hiedit.policy.selectors import Selector
from hiedit.rl.environment import Environment
from hiedit.rl.features import StateFeatures, gain_over_energy
from hiedit.rl.preserved import Preserved, sureness
from hiedit.rl.reference import Pair
from hiedit.rl.sequences import EditSequences
from hiedit.types import Action, EditBatch, EditRequest, Shift, Shifts, Signals, TokenBatch
from hiedit.updaters.updater import Updater


@dataclass(frozen=True)
class Outcome:
    """The outcome of one step.

    mask: [E, L], union over the passes kept. passes: shifts computed, undone ones included.
    loss, confidence: [E], of the edit prompt after the step (NaN where the last pass was not
    checked, because nothing would have been undone). held: all edits are known to have reached
    the target probability. shifts: what is (to be) committed, by module. signals: the edits', of
    the last pass, None if there was none. requests: what was edited.
    """

    mask: Tensor
    passes: int
    loss: Tensor
    confidence: Tensor
    held: bool
    shifts: Shifts
    signals: Signals | None = None
    requests: tuple[EditRequest, ...] = ()


Choice = tuple[Signals, Action] | None
PassHook = Callable[[Signals, Action], Shifts]


class Rollout:
    """Applies edits one step after another to the environment's model.

    preserved: prompts that must hold for an edit to be done; training has a reward for that
    instead, and asks none. contexts: texts before which an edit is made too.
    """

    def __init__(
        self,
        env: Environment,
        selector: Selector,
        updater: Updater,
        passes: PassesConfig,
        observe: bool = True,
        preserved: Preserved | None = None,
        contexts: Sequence[str] = (),
    ):
        self.contexts = tuple(contexts)
        self.preserved = preserved or Preserved((), passes)
        self.env, self.selector, self.updater = env, selector, updater
        self.passes, self.observe = passes, observe
        told = selector.config.features
        self._features = StateFeatures(env, updater, told) if told else None

    def told(self, signals: Signals) -> Signals:
        """``signals`` with what the policy is told of the modules' state beside them."""
        if self._features is None:
            return signals
        return dataclasses.replace(signals, state=self._features(signals))

    def reset(self) -> None:
        """The base model, and no earlier edit to protect."""
        self.env.reset()
        self.preserved.reset()
        self.updater.reset()
        self.selector.reset()

    def step(self, batch: EditBatch, on_pass: PassHook | None = None) -> Outcome:
        """Edit until every request holds or the passes are used up, then commit.

        on_pass: computes the pass's shifts itself (training does, to keep their graph).
        """
        outcome = self.propose(batch, on_pass)
        self.commit(outcome)
        return outcome

    def commit(self, outcome: Outcome, write: Callable[[Shifts], object] | None = None) -> None:
        """Make what ``propose`` left pending part of the weights, and protect it.

        write: puts the shifts into the weights, see ``Environment.commit``.
        """
        if self.env.commit(write, outcome.shifts) and outcome.signals is not None:
            self.updater.absorb(outcome.signals, outcome.mask)
        self.preserved.edited(outcome.requests)

    def propose(self, batch: EditBatch, on_pass: PassHook | None = None) -> Outcome:
        """The same on trial: its passes are pending, for ``commit`` or ``env.drop`` to settle."""
        self.env.drop()
        edits = len(batch)
        asked, owner = self._asked(batch) if on_pass is None else ([], [])
        tokens = self._encode(batch, asked, on_pass is None)
        target = self._targets(edits, len(asked))
        masks: list[Tensor] = []  # [E, L] of the passes on trial
        choice: Choice = None  # of the edit, unless every pass makes its own
        used, before, signals = 0, None, None
        past = self.env.past(tokens, self.updater.config.tokens) if on_pass is None else None
        while True:
            probe = self.env.probe(tokens, len(target), self.updater.config.tokens, past)
            loss, confidence = probe.loss, probe.confidence
            worse = before is not None and not bool(loss.sum() <= before[0].sum())
            if worse and self.passes.undo:
                undone = self.env.pop()
                if used < self.passes.max and _halvable(undone):
                    self.env.push(_half(undone))
                    used += 1
                    continue
                masks.pop()
                loss, confidence = before
                break
            active = confidence <= target
            if past is not None and not bool(active.any()) and not self._confirmed(tokens, target):
                past, before = None, None  # from here on with the whole of every prompt
                continue
            inert = self.updater.config.kind == "none"
            if inert or used >= self.passes.max or not bool(active.any()):
                break
            every = probe.signals()
            signals = every.first(edits)
            choice = self._choose(signals, choice, on_pass is not None)
            shifts, mask = self._pass(every, signals, choice[1], active, owner, on_pass, used)
            if not shifts:  # nothing that could be done
                break
            masks.append(mask)
            self.env.push(shifts)
            used, before = used + 1, (loss, confidence)
            if used >= self.passes.max and not self.passes.undo:  # nobody asks how it went
                loss = confidence = torch.full_like(loss, torch.nan)
                break
        return self._outcome(batch, masks, used, loss[:edits], confidence[:edits], signals)

    def _confirmed(self, tokens: TokenBatch, target: Tensor) -> bool:
        """Tell whether every edit holds on its own prompt, the first of its sequences, when all of
        it is computed with the passes on trial."""
        if not self.env.pending:
            return True
        firsts = (tokens.edit[:, None] == torch.arange(len(target), device=target.device)).long()
        with torch.no_grad():
            answers = self.env.answers(tokens.select(firsts.argmax(0)))
        return bool((answer_confidence(answers) > target).all())

    def _choose(self, signals: Signals, choice: Choice, explore: bool) -> Choice:
        """(signals, action) that decide which modules this pass touches.

        An edit is an option: its first pass chooses and the later ones follow. A policy decides
        anew from the first signals, which gives the same mask and a graph for this pass. explore:
        whether a policy that samples may.
        """
        if choice is None or self.selector.config.every_pass:
            signals = self.told(signals)
            if self.observe:
                self.selector.observe(signals)
            gains = None
            if self.selector.config.kind == "gain":
                gains = gain_over_energy(self.updater, signals)
            return signals, self.selector(signals, explore, gains)
        first, action = choice
        return first, self.selector.again(first, action)

    def _pass(
        self,
        every: Signals,
        signals: Signals,
        action: Action,
        active: Tensor,
        owner,
        on_pass,
        used: int,
    ) -> tuple[Shifts, Tensor]:
        """(shifts, [E, L] the modules that each edit's got one). every: signals of the E edits and
        the P preserved prompts, which take the modules of their ``owner``; signals: the edits'.
        active: bool [E + P], what does not hold yet. used: passes so far."""
        if self.observe:
            self.updater.observe(signals)
        if on_pass is not None:
            action = _only(action, active)
            shifts, mask = on_pass(signals, action), action.mask.detach()
        else:
            rows = torch.tensor([*range(len(action.mask)), *owner], device=active.device)
            mask = action.mask.detach()[rows] * active[:, None].to(action.mask.dtype)  # [E + P, L]
            with torch.no_grad():
                shifts = self.updater(every, mask, used=used)
            index = rows[:, None].expand_as(mask)
            mask = torch.zeros_like(action.mask).scatter_reduce(0, index, mask, "amax")
        return shifts, mask * mask.new_tensor([n in shifts for n in self.updater.names])

    def _outcome(self, batch, masks, used, loss, confidence, signals) -> Outcome:
        none = torch.zeros(len(batch), len(self.updater.names), device=loss.device)
        union = torch.stack([none, *masks]).amax(0)
        held = bool((confidence > self.passes.target_probability).all())
        shifts = self.env.trial()
        return Outcome(union, used, loss, confidence, held, shifts, signals, batch.requests)

    def _asked(self, batch: EditBatch) -> tuple[list[Pair], list[int]]:
        """Return what has to hold beside the edits, and the edit of each; the weights are
        committed."""
        backbone = self.env.backbone
        screen = partial(sureness, backbone) if self.passes.screened else None
        return self.preserved.draw(batch, screen)

    def _encode(
        self, batch: EditBatch, asked: Sequence[Pair] = (), editing: bool = False
    ) -> TokenBatch:
        """The sequences of each edit, then one per preserved prompt. Training is rewarded by what
        phrasings say, so it edits none."""
        backbone, config = self.env.backbone, self.updater.config
        subject, alone = config.tokens == "subject", config.subject_alone and editing
        sequences = EditSequences(backbone.tokenizer, self.contexts, editing, subject, alone)
        return sequences.encode(batch, asked).to(backbone.device)

    def _targets(self, edits: int, asked: int) -> Tensor:
        """[E + P]: the probability that each sequence's answer has to exceed."""
        p = self.passes
        values = [p.target_probability] * edits + [p.preserved_probability] * asked
        return torch.tensor(values, device=self.env.backbone.device)


def _only(action: Action, active: Tensor) -> Action:
    """Edits that already hold are left alone."""
    draws = action.draws
    if draws is not None:
        draws = draws.masked_fill(~active[:, None], -1)
    return Action(action.mask * active[:, None].to(action.mask.dtype), action.logits, draws)


def _halvable(shifts: Shifts, smallest: float = 0.1) -> bool:
    """A pass is retried at a half, a quarter, an eighth of its size, and no smaller."""
    return any(s.scale is not None and float(s.scale.max()) > 2 * smallest for s in shifts.values())


def _half(shifts: Shifts) -> Shifts:
    return {n: Shift(s.A, s.B, s.scale * 0.5) for n, s in shifts.items() if s.scale is not None}
