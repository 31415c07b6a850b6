"""The reference of locality, computed once: log-probabilities on unrelated prompts.

The pass that a step keeps was measured with its shift in place, on every prompt that the next
step will look at again. What the model said there *is* the next step's reference, up to the
rounding of a functional against a committed shift, so only prompts that are new need a forward.

Shapes: ``M`` answer tokens of the unrelated prompts, ``V`` the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hiedit.backbone.bytecache import ByteCache
from hiedit.backbone.losses import AnswerLogits
from hiedit.rl.environment import Environment
from hiedit.types import Shifts, TokenBatch

BASE_BYTES = 256 << 20
Pair = tuple[str, str]  # prompt and answer


@dataclass(frozen=True)
class Measured:
    """The effect of a pass on trial on the unrelated prompts.

    passes: all shifts then in place, this pass last. answers: of ``pairs``, without a graph.
    """

    passes: list[Shifts]
    pairs: Sequence[Pair]
    answers: AnswerLogits


class References:
    """Log-probabilities by prompt and answer, of the model before the step or the base model."""

    def __init__(self, base: bool):
        self.base = base
        self._known = ByteCache(BASE_BYTES)
        self._version: int | None = None  # of the environment that ``_known`` describes
        self._measured: list[Measured] = []

    def __call__(self, env: Environment, pairs: Sequence[Pair], tokens: TokenBatch) -> Tensor:
        """[M, V] of the sequences ``tokens``, which are ``pairs``; computes what is not known."""
        if not self.base:
            self._advance(env)
        found = {pair: self._known.get(pair) for pair in pairs}
        new = {pair: row for row, pair in enumerate(pairs) if found[pair] is None}
        if new:
            rows = torch.tensor(list(new.values()), device=tokens.ids.device)
            answers = self._measure(env, tokens.select(rows))
            found |= dict(zip(new, _by_row(answers), strict=True))
            for pair in new:
                self._known.put(pair, found[pair])
        return torch.cat([found[pair] for pair in pairs])

    def measured(
        self, env: Environment, pairs: Sequence[Pair], answers: AnswerLogits, shifts: Shifts
    ) -> None:
        """Keep what ``shifts``, on top of the pending passes, did to ``pairs``."""
        if self.base or not _exact(env):
            return
        passes = [*env.pending, {name: shift.detach() for name, shift in shifts.items()}]
        kept = AnswerLogits(answers.logits.detach(), answers.target, answers.row, answers.rows)
        self._measured.append(Measured(passes, pairs, kept))

    def known(self, pairs: Sequence[Pair]) -> dict[Pair, Tensor]:
        """Return what is known of ``pairs``, without computing anything."""
        found = {pair: self._known.get(pair) for pair in dict.fromkeys(pairs)}
        return {pair: logp for pair, logp in found.items() if logp is not None}

    def keep(self, env: Environment, pairs: Sequence[Pair]) -> None:
        """Forget all but ``pairs``, and what the last step measured and did not keep."""
        if not self.base:
            self._advance(env)
        self._put(self.known(pairs))

    def load(self, env: Environment, known: Mapping[Pair, Tensor]) -> None:
        """Know exactly ``known``, of ``env`` as it is."""
        self._measured = []
        self._version = None if self.base else env.version
        self._put(known)

    def _put(self, known: Mapping[Pair, Tensor]) -> None:
        self._known.clear()
        for pair, logp in known.items():
            self._known.put(pair, logp)

    def _measure(self, env: Environment, tokens: TokenBatch) -> AnswerLogits:
        if self.base:
            with env.state.base_weights():
                return env.backbone.answers(tokens)
        return env.answers(tokens)

    def _advance(self, env: Environment) -> None:
        """Bring what is known to the environment's present state, or forget it."""
        if env.version != self._version or env.pending:
            self._known.clear()
        if self._version is not None and env.version == self._version + 1 and not env.pending:
            for seen in reversed(self._measured):
                if _same_passes(seen.passes, env.committed):
                    for pair, logp in zip(seen.pairs, _by_row(seen.answers), strict=True):
                        self._known.put(pair, logp)
                    break
        self._measured = []
        self._version = None if env.pending else env.version


def _by_row(answers: AnswerLogits) -> list[Tensor]:
    """Log-probabilities [answer tokens, V] of each sequence, each in memory of its own."""
    logp = answers.logits.float().log_softmax(-1)
    counts = torch.bincount(answers.row, minlength=answers.rows).tolist()
    return [part.clone() for part in logp.split(counts)]


def _exact(env: Environment) -> bool:
    """Tell whether a committed shift does what it did while functional: in half precision the
    weights round small shifts away, and the reference would be of a model that does not exist."""
    weights = (module.weight for module in env.backbone.modules.values())
    return all(w.dtype in (torch.float32, torch.float64) for w in weights)


def _same_passes(tried: list[Shifts], committed: list[Shifts]) -> bool:
    """Tell whether ``committed`` are the very shifts that were tried: a pass that was halved has a
    scale of its own. Modules without a row in use are no part of a committed pass."""
    return len(tried) == len(committed) and all(
        all(name in a and _same_shift(a[name], shift) for name, shift in b.items())
        for a, b in zip(tried, committed, strict=True)
    )


def _same_shift(a, b) -> bool:
    if a is b:
        return True
    if (a.scale is None) != (b.scale is None):
        return False
    pairs = [(a.A, b.A), (a.B, b.B)] + ([] if a.scale is None else [(a.scale, b.scale)])
    return all(x.is_set_to(y) for x, y in pairs)
