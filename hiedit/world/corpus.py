"""The sentences that the world model learns: every fact in every seen phrasing of its relation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hiedit.types import IGNORE
from hiedit.world.facts import Fact
from hiedit.world.phrasings import phrasings_of


def seen_prompts(fact: Fact) -> list[str]:
    """The fact's prompts in the phrasings that the model is trained on."""
    return [template.format(fact.subject) for template in phrasings_of(fact.relation).seen]


def heldout_prompt(fact: Fact) -> str:
    """The fact's prompt in the phrasing that no training ever shows."""
    return phrasings_of(fact.relation).heldout.format(fact.subject)


def sentences(facts: list[Fact]) -> list[tuple[str, str]]:
    """All training sentences as (prompt, answer), to be joined by one space."""
    return [(prompt, fact.answer) for fact in facts for prompt in seen_prompts(fact)]


@dataclass(frozen=True)
class Sentences:
    """Tokenised sentences, padded on the right.

    ids: int64 [N, S], ``<s>`` prompt answer ``</s>`` and padding.
    weight: float32 [N, S], how much the prediction *of* this token counts: 1 on the answer and
        the end, ``prompt_weight`` on the prompt, 0 on the start and on padding.
    length: int64 [N], tokens without padding.
    """

    ids: Tensor
    weight: Tensor
    length: Tensor

    def answers(self) -> Tensor:
        """int64 [N, S]: ``ids`` at the answer and the end, elsewhere ``IGNORE``."""
        return torch.where(self.weight == 1, self.ids, IGNORE)


def tokenise(pairs: list[tuple[str, str]], tokenizer, prompt_weight: float = 0.2) -> Sentences:
    """Tokenises (prompt, answer) pairs; the answer is tokenised with the space before it."""
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    answers = tokenizer([f" {a}" for _, a in pairs], add_special_tokens=False)["input_ids"]
    rows = [p + a + [tokenizer.eos_token_id] for p, a in zip(prompts, answers, strict=True)]
    length = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(length.max())), tokenizer.pad_token_id)
    weight = torch.zeros(ids.shape)
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        weight[i, 1 : len(prompt)] = prompt_weight
        weight[i, len(prompt) : len(row)] = 1.0
    return Sentences(ids, weight, length)


def batches(data: Sentences, size: int, generator: torch.Generator):
    """Endless batches of row indices [size], epoch after epoch, each of sentences of like length.

    Sorting by length within pools of 32 batches saves a third of the padding and keeps the order
    random enough.
    """
    count, pool = len(data.length), size * 32
    while True:
        order = torch.randperm(count, generator=generator)
        chunks = []
        for rows in order[: count - count % size].split(pool):
            rows = rows[data.length[rows].argsort(stable=True)]
            chunks += [chunk for chunk in rows.split(size)]
        for i in torch.randperm(len(chunks), generator=generator).tolist():
            yield chunks[i]
