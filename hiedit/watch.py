"""Watching what no edit should move: the model's own answers to everyday prompts, to prompts that
were drawn, and its own texts, compared before an edit, with it, and with the unedited model.

    prompts -> own greedy answers of the base model -> one batch of tokens
    every edit: one forward pass -> KL from the present model, KL from the base model

Shapes: ``N`` sequences, ``M`` watched tokens in them, ``V`` the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hiedit.backbone.model import Backbone
from hiedit.data.neutral import INVENTED, NEUTRAL
from hiedit.data.tokens import encode_prompts, pad_id
from hiedit.limits import Moved
from hiedit.rl.environment import Environment
from hiedit.types import IGNORE, TokenBatch

# One forward pass over this many tokens is what watching costs an edit; see docs/safety.md.
TOKENS = 112
ANSWER = 1  # greedy tokens watched after a prompt
MANY = 32  # prompts that those which come with the model or the method are drawn from
DRAWN = 4  # prompts at most that come with the model or the method
FORMS = 9  # of invented people and places, at most
TEXTS = ("The",)  # the model goes on from these by itself
TEXT = 12  # tokens of each such text
GIVEN = 2  # its first tokens, which say little of the model, are not watched

Sequences = list[tuple[list[int], int]]  # tokens, and how many of the first are given


class Watch:
    """The watched tokens of one environment; what the base model says to them is found out at the
    first measurement, under its weights, and kept in memory (three [M, V] in single precision).

    prompts: those to draw from, beside the everyday ones. seed: of the model's own texts.
    """

    def __init__(self, env: Environment, prompts: Iterable[str] = (), seed: int = 0):
        self.env, self.seed = env, seed
        everyday = {beginning for beginning, _ in NEUTRAL}
        self._drawn = [p for p in dict.fromkeys(prompts) if p not in everyday][:MANY]
        self.tokens: TokenBatch | None = None
        self._base: Tensor | None = None
        self._present: Tensor | None = None
        self._trial: Tensor | None = None
        self._version: int | None = None
        self._drift = 0.0  # of the present model, from the base model
        self._moved: Moved | None = None

    @torch.no_grad()
    def measure(self) -> Moved:
        """The environment's model with its pending passes; one forward pass, two where the
        weights have changed since the last ``accept``."""
        self._begin()
        if self._version != self.env.version:
            self._present, self._version = _logp(self.env.backbone, self.tokens), self.env.version
            self._drift = _kl(self._base, self._present)
        with self.env.with_shifts():
            self._trial = _logp(self.env.backbone, self.tokens)
        changed = (self._trial.argmax(-1) != self._base.argmax(-1)).float().mean()
        self._moved = Moved(
            _kl(self._present, self._trial),
            _kl(self._base, self._trial),
            self._drift,
            float(changed),
        )
        return self._moved

    def accept(self) -> None:
        """Return what was measured last has been committed: it is the present model."""
        self._present, self._version = self._trial, self.env.version
        self._drift = self._moved.drift

    @torch.no_grad()
    def _begin(self) -> None:
        if self._base is None:
            backbone = self.env.backbone
            with self.env.state.base_weights():
                self.tokens = watched_tokens(backbone, self._drawn, self.seed)
                self._base = _logp(backbone, self.tokens)


def watched_tokens(backbone: Backbone, drawn: Sequence[str], seed: int) -> TokenBatch:
    """The model's own texts, then prompts with its greedy answers: ``drawn`` ones, invented ones,
    everyday ones, the shortest of each first; at most ``TOKENS`` tokens (one prompt at least).
    Labels mark what is watched."""
    texts = [(text, GIVEN) for text in _texts(backbone, seed)]
    left = TOKENS - sum(len(text) for text, _ in texts)
    prompts = _shortest(backbone, drawn)[:DRAWN] + _shortest(backbone, INVENTED)[:FORMS]
    prompts += _shortest(backbone, [beginning for beginning, _ in NEUTRAL])
    chosen: list[list[int]] = []
    for prompt in prompts:
        left -= len(prompt) + ANSWER
        if chosen and left < 0:
            break
        chosen.append(prompt)
    answered = chosen
    for _ in range(ANSWER):
        following = _next(backbone, answered).argmax(-1).tolist()
        answered = [s + [token] for s, token in zip(answered, following, strict=True)]
    found = [(s, len(p)) for s, p in zip(answered, chosen, strict=True)]
    return _batch(backbone, [*texts, *found])


def _shortest(backbone: Backbone, prompts: Sequence[str]) -> list[list[int]]:
    if not prompts:
        return []
    ids, attention = encode_prompts(backbone.tokenizer, prompts)
    rows = [row[kept.bool()].tolist() for row, kept in zip(ids, attention, strict=True)]
    return sorted(rows, key=len)


def _texts(backbone: Backbone, seed: int) -> list[list[int]]:
    """Drawn from the model token by token, as it would go on by itself."""
    texts = _shortest(backbone, TEXTS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max(0, TEXT - max(map(len, texts)))):
        probability = _next(backbone, texts).softmax(-1).cpu()
        drawn = torch.multinomial(probability, 1, generator=generator)[:, 0].tolist()
        texts = [text + [token] for text, token in zip(texts, drawn, strict=True)]
    return texts


def _next(backbone: Backbone, sequences: Sequence[list[int]]) -> Tensor:
    """[N, V]: logits of what follows each sequence."""
    fill = pad_id(backbone.tokenizer)
    given = [([*sequence, fill], len(sequence)) for sequence in sequences]
    return backbone.answers(_batch(backbone, given)).logits.float()


def _batch(backbone: Backbone, sequences: Sequences) -> TokenBatch:
    """Padded on the left; labelled from the first token on that is not given."""
    width = max(len(tokens) for tokens, _ in sequences)
    ids = torch.full((len(sequences), width), pad_id(backbone.tokenizer))
    attention = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE)
    for row, (tokens, given) in enumerate(sequences):
        start = width - len(tokens)
        ids[row, start:] = torch.tensor(tokens)
        attention[row, start:] = 1
        labels[row, start + given :] = ids[row, start + given :]
    return TokenBatch(ids, attention, labels, torch.arange(len(sequences))).to(backbone.device)


def _logp(backbone: Backbone, tokens: TokenBatch) -> Tensor:
    """[M, V], in the model's present state."""
    found = backbone.answers(tokens).logits.float()
    for row in found:  # a vocabulary at a time: larger temporaries cost more than the arithmetic
        row.sub_(row.logsumexp(-1))
    return found


def _kl(before: Tensor, after: Tensor) -> float:
    """Mean over the watched tokens of KL(before || after)."""
    if before is after:
        return 0.0
    rows = zip(before, after, strict=True)
    return float(torch.stack([(p.exp() * (p - q)).sum() for p, q in rows]).mean())
