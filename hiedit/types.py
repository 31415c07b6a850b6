"""The frozen dataclasses that pass between stages; data flows through them in this order.

    records -> stream -> EditBatch -> Signals -> Action (mask) + Shifts -> commit -> Reward

Shape letters, used everywhere: ``E`` edits in a batch, ``T`` edit tokens, ``L`` editable modules,
``I``/``O`` in and out features, ``r`` rank, ``N`` sequences, ``S`` positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

IGNORE = -100  # label of a position that carries no loss, as everywhere in transformers


@dataclass(frozen=True)
class Locality:
    """A prompt that an edit must leave alone; ``answer`` is the gold answer where one is known."""

    prompt: str
    answer: str | None = None


@dataclass(frozen=True)
class EditRequest:
    """A prompt and the answer that the model should give from now on.

    ``prompt`` has no trailing space and ``target`` no leading one; they are joined by one space.
    ``paraphrases`` are for training the editor, ``heldout`` ones only for measuring generalisation
    (a dataset with a single paraphrase has it in both: it then depends on the split).

    Raises:
        ValueError: if ``prompt`` or ``target`` is empty.
    """

    prompt: str
    target: str
    paraphrases: tuple[str, ...] = ()
    locality: tuple[Locality, ...] = ()
    heldout: tuple[str, ...] = ()
    subject: str | None = None
    old_target: str | None = None
    relation: str | None = None

    def unaided(self) -> EditRequest:
        """The same without paraphrases: an editor that is measured is given the prompt alone."""
        return dataclasses.replace(self, paraphrases=()) if self.paraphrases else self

    def __post_init__(self):
        for name in ("prompt", "target"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(
                    f"EditRequest.{name} is {value!r}: it must be a string that is not empty"
                )


@dataclass(frozen=True)
class TokenBatch:
    """Padded sequences of prompt and answer.

    ids: int64 [N, S]. attention: int64 [N, S], 0 at padding (either side).
    labels: int64 [N, S], the token itself where it belongs to an answer, else ``IGNORE``. The
        logits at position s-1 predict the label at s.
    edit: int64 [N], which edit of the batch a sequence belongs to.
    subject: int64 [N], the column of the subject's last token, -1 where no subject is known; None
        where nobody asked.
    """

    ids: Tensor
    attention: Tensor
    labels: Tensor
    edit: Tensor
    subject: Tensor | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    def to(self, device) -> TokenBatch:
        return self._each(lambda part: part.to(device))

    def select(self, rows: Tensor) -> TokenBatch:
        """The sequences ``rows`` (int64 or bool [N]), columns that are all padding kept."""
        return self._each(lambda part: part[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> TokenBatch:
        parts = (getattr(self, f.name) for f in dataclasses.fields(self))
        return TokenBatch(*(None if part is None else change(part) for part in parts))


@dataclass(frozen=True)
class EditBatch:
    """The requests of one step of a stream (``E`` of them), in order of arrival; first: how many
    of the stream came before them."""

    requests: tuple[EditRequest, ...]
    first: int = 0

    def __len__(self) -> int:
        return len(self.requests)


@dataclass(frozen=True)
class Signals:
    """An edit as it looks at every editable module.

    keys: by module name, [T, I], the module's inputs at the edit tokens.
    grads: by module name, [T, O], gradient of the summed edit loss at the module's outputs.
    edit: int64 [T], the edit each token belongs to.
    loss: [E], edit loss (mean negative log-likelihood of the answer's tokens, nats).
    confidence: [E], smallest probability of any answer token.
    state: [E, L, F], what the policy is told of every module beside these (rl/features.py).
    subject: bool [T], the tokens that are the last of their sequence's subject; None where nobody
        asked for these.
    answer: [E], tokens of the answer (mean over the edit's sequences); None: one.
    """

    keys: Mapping[str, Tensor]
    grads: Mapping[str, Tensor]
    edit: Tensor
    loss: Tensor
    confidence: Tensor
    state: Tensor | None = None
    subject: Tensor | None = None
    answer: Tensor | None = None

    def first(self, edits: int) -> Signals:
        """Those of the first ``edits`` edits alone."""
        if edits == len(self.loss):
            return self
        kept = self.edit < edits
        return Signals(
            {n: k[kept] for n, k in self.keys.items()},
            {n: g[kept] for n, g in self.grads.items()},
            self.edit[kept],
            self.loss[:edits],
            self.confidence[:edits],
            None if self.state is None else self.state[:edits],
            None if self.subject is None else self.subject[kept],
            None if self.answer is None else self.answer[:edits],
        )


@dataclass(frozen=True)
class Action:
    """The high level's choice.

    mask: [E, L] in {0, 1}; carries the straight-through gradient where the estimator has one.
    logits: [E, L] of the policy, or None for a selector without one.
    draws: int64 [S, E, L], what an estimator wants scored, see policy/estimators.py; the mask is
        one of them, or the mode.
    """

    mask: Tensor
    logits: Tensor | None = None
    draws: Tensor | None = None


@dataclass(frozen=True)
class Shift:
    """A low-rank update of one module, ``delta_W = B diag(scale) A`` in LoRA's naming.

    A: [r, I]. B: [O, r]. scale: [r], the mask of the edit that each rank row belongs to
    (0 rows are no part of the update), or None for all ones.
    """

    A: Tensor
    B: Tensor
    scale: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def dense(self) -> Tensor:
        """[O, I]; for tests and exports, never in the training loop."""
        left = self.B if self.scale is None else self.B * self.scale
        return left @ self.A

    def detach(self) -> Shift:
        scale = None if self.scale is None else self.scale.detach()
        return Shift(self.A.detach(), self.B.detach(), scale)


Shifts = Mapping[str, Shift]  # by module name, in the model's order


@dataclass(frozen=True)
class Reward:
    """The terms of one step's negative reward, each a scalar; ``loss`` is their weighted sum.

    edit: cross-entropy on paraphrases, decayed by the age of the edit (nats per token).
    locality: KL to the model before the step on unrelated prompts (nats).
    size: energy or squared norm of the shift.
    """

    loss: Tensor
    edit: Tensor
    locality: Tensor
    size: Tensor
    extra: Mapping[str, float] = field(default_factory=dict)
