"""The sequences that an edit is made on: its prompt, the same behind random texts, and its other
phrasings.

    request -> [prompt, context_1 prompt, ..., paraphrase_1, ...] -> TokenBatch, one edit

An edit that is made on the bare prompt alone hangs on it. The random texts, *contexts*, are drawn
from the model itself (as MEMIT does: Meng et al. 2023, section 4.2), once, and kept: an editor that
is opened again edits with the same.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from hiedit.backbone.model import Backbone
from hiedit.data.subjects import find_subject, spans_of
from hiedit.data.tokens import Span, encode, encode_prompts
from hiedit.types import IGNORE, EditBatch, EditRequest, TokenBatch

Pair = tuple[str, str]  # prompt and answer
OPENINGS = ("The", "Therefore", "Because", "I", "You")
SHORTEST, LONGEST = 5, 10  # tokens of a context
TOP = 5  # tokens that each is drawn from


class EditSequences:
    """Makes the sequences of edits.

    tokenizer: of the model. contexts: texts that stand before the prompt. phrasings: whether the
    paraphrases that a request brings are edited too (those it holds out never are). subject:
    whether the last token of the subject is looked up in every sequence. alone: whether the subject
    alone stands behind every context as well, without an answer: what is written at the prompt's
    subject is then written there too, whatever was said before (``Signals`` shares the gradients).
    """

    def __init__(
        self,
        tokenizer,
        contexts: Sequence[str] = (),
        phrasings: bool = True,
        subject: bool = False,
        alone: bool = False,
    ):
        self.tokenizer, self.contexts = tokenizer, tuple(contexts)
        self.phrasings, self.subject, self.alone = phrasings, subject, alone and subject

    def prompts(self, request: EditRequest) -> list[str]:
        """All that ``request`` is edited on; its own prompt is the first."""
        found = [request.prompt, *(f"{text} {request.prompt}" for text in self.contexts)]
        if self.phrasings:
            found += [p for p in request.paraphrases if p not in request.heldout]
        return list(dict.fromkeys(found))

    def encode(self, batch: EditBatch, asked: Sequence[Pair] = ()) -> TokenBatch:
        """The sequences of ``batch``'s edits, then one for each of ``asked``, which counts as an
        edit of its own."""
        pairs: list[Pair] = []
        owner: list[int] = []
        spans: list[Span | None] = []
        mute: list[int] = []  # sequences without an answer
        for edit, request in enumerate(batch.requests):
            prompts = self.prompts(request)
            pairs += [(prompt, request.target) for prompt in prompts]
            spans += spans_of(request, prompts)
            for prompt, span in self._alone(request):
                mute.append(len(pairs))
                pairs.append((prompt, request.target))
                spans.append(span)
            owner += [edit] * (len(pairs) - len(owner))
        pairs += asked
        owner += range(len(batch), len(batch) + len(asked))
        spans += [find_subject(prompt) for prompt, _ in asked]
        subjects = spans if self.subject else None
        batch = encode(self.tokenizer, pairs, owner, padding_side="left", subjects=subjects)
        return _cut(_inside(batch), mute) if mute else _inside(batch)

    def _alone(self, request: EditRequest) -> list[tuple[str, Span]]:
        """The subject behind every context, and where it stands there."""
        (span,) = spans_of(request, [request.prompt]) if self.alone else (None,)
        if span is None:
            return []
        name = request.prompt[slice(*span)]
        return [(f"{t} {name}", (len(t) + 1, len(t) + 1 + len(name))) for t in self.contexts]


def _inside(batch: TokenBatch) -> TokenBatch:
    """``batch`` without the subjects that are a sequence's first token: that is mostly a sink,
    whatever it says, so no edit may act on it (``edit_tokens`` then takes the answer's)."""
    if batch.subject is None:
        return batch
    first = (batch.attention.cumsum(-1) == 0).sum(-1)  # columns of padding on the left
    kept = batch.subject.masked_fill(batch.subject <= first, -1)
    return dataclasses.replace(batch, subject=kept)


def _cut(batch: TokenBatch, rows: list[int]) -> TokenBatch:
    """``batch`` whose sequences ``rows`` end with the subject and have no answer."""
    labels, attention = batch.labels.clone(), batch.attention.clone()
    columns = torch.arange(batch.ids.shape[1])
    labels[rows] = IGNORE
    attention[rows] *= (columns <= batch.subject[rows][:, None]).long()
    return dataclasses.replace(batch, labels=labels, attention=attention)


def draw_contexts(backbone: Backbone, count: int, seed: int = 0) -> tuple[str, ...]:
    """``count`` texts of ``SHORTEST`` to ``LONGEST`` tokens that the model continues ``OPENINGS``
    with, each token one of its ``TOP``, ended by a full stop; the same for the same seed. They are
    drawn side by side, in ``LONGEST`` forward passes at most."""
    if not count:
        return ()
    tokenizer, draw = backbone.tokenizer, torch.Generator().manual_seed(seed)
    ids, attention = encode_prompts(tokenizer, [OPENINGS[i % len(OPENINGS)] for i in range(count)])
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=draw)
    ends = (ids.shape[1] + lengths).tolist()
    never = torch.tensor(tokenizer.all_special_ids, dtype=torch.long)
    while ids.shape[1] < max(ends):
        logits = backbone.next_logits(ids, attention)
        best = logits.index_fill(1, never[never < logits.shape[1]], -torch.inf).topk(TOP)
        chosen = torch.multinomial(best.values.softmax(-1), 1, generator=draw)
        ids = torch.cat([ids, best.indices.gather(1, chosen)], 1)
        attention = torch.cat([attention, torch.ones_like(chosen)], 1)
    found = []
    for row, kept, end in zip(ids, attention.bool(), ends, strict=True):
        text = " ".join(tokenizer.decode(row[:end][kept[:end]], skip_special_tokens=True).split())
        found.append(text.rstrip(".") + ".")
    return tuple(found)


def as_tensor(texts: Sequence[str]) -> Tensor:
    """uint8 [bytes]: ``texts`` as they are saved among an editor's tensors."""
    return torch.tensor(list(json.dumps(list(texts)).encode()), dtype=torch.uint8)


def from_tensor(tensor: Tensor) -> tuple[str, ...]:
    """Return what ``as_tensor`` holds; RuntimeError where it is none of its making."""
    try:
        texts = json.loads(bytes(tensor.tolist()))
        return tuple(str(text) for text in texts)
    except (ValueError, TypeError) as error:
        raise RuntimeError(f"contexts: {error}") from None
