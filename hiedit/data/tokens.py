"""Tokens: padded batches of prompt and answer whose labels mark exactly the answer.

Prompt and answer are tokenised together, joined by one space, because BPE may merge across the
boundary; where the answer begins is read off the character offsets.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hiedit.types import IGNORE, TokenBatch

Span = tuple[int, int]  # characters, start and end


def encode(
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    edit: Sequence[int] | None = None,
    padding_side: str = "right",
    eos: bool = False,
    max_length: int | None = None,
    subjects: Sequence[Span | None] | None = None,
) -> TokenBatch:
    """``pairs`` of prompt and answer as one batch.

    A token is labelled if it holds any of the answer, or nothing but the space before it. The
    first token of a sequence never is: nothing predicts it. The tokenizer's own special tokens are
    added in front (bos) and not at the end.

    Args:
        tokenizer: of transformers, fast or slow.
        edit: which edit each pair belongs to; None counts them.
        padding_side: ``right`` or ``left``.
        eos: end every answer with the end-of-sequence token, labelled.
        max_length: in tokens.
        subjects: for each pair, where in its prompt the subject stands (characters, start and
            end), or None; then ``subject`` of the batch is set, never behind the position that
            predicts the answer's first token.

    Raises:
        ValueError: if an answer is empty or would be cut by ``max_length``, naming its prompt.
    """
    pairs = list(pairs)
    edit = list(range(len(pairs))) if edit is None else list(edit)
    if len(edit) != len(pairs):
        raise ValueError(f"edit has {len(edit)} entries for {len(pairs)} pairs")
    if eos and tokenizer.eos_token_id is None:
        raise ValueError("eos=True: the tokenizer has no end-of-sequence token")
    for prompt, answer in pairs:
        if not answer.strip():
            raise ValueError(f"the answer to {prompt!r} is empty")
    sequences, starts = _joined(tokenizer, pairs)
    front = _front(tokenizer)
    tail = [tokenizer.eos_token_id] if eos else []
    sequences = [front + sequence + tail for sequence in sequences]
    starts = [max(1, len(front) + start) for start in starts]
    for (prompt, answer), sequence, start in zip(pairs, sequences, starts, strict=True):
        if start >= len(sequence) - len(tail):
            raise ValueError(f"prompt {prompt!r} and answer {answer!r} are one token together")
        if max_length is not None and len(sequence) > max_length:
            raise ValueError(
                f"prompt {prompt!r} with its answer has {len(sequence)} tokens: max_length="
                f"{max_length} would cut the answer"
            )
    ids, attention, position = _pad(sequences, pad_id(tokenizer), padding_side)
    answer_from = torch.tensor(starts, dtype=torch.long).view(-1, 1)
    labelled = attention.bool() & (position >= answer_from)
    labels = ids.masked_fill(~labelled, IGNORE)
    edits = torch.tensor(edit, dtype=torch.long)
    if subjects is None:
        return TokenBatch(ids, attention, labels, edits)
    last = _last_tokens(tokenizer, pairs, subjects)
    width = ids.shape[1] if len(pairs) else 0
    shift = [width - len(s) if padding_side == "left" else 0 for s in sequences]
    column = [
        -1 if at is None else min(at + len(front), start - 1) + by
        for at, start, by in zip(last, starts, shift, strict=True)
    ]
    return TokenBatch(ids, attention, labels, edits, torch.tensor(column, dtype=torch.long))


def _last_tokens(
    tokenizer: Any, pairs: list[tuple[str, str]], subjects: Sequence[Span | None]
) -> list[int | None]:
    """Index of the last token that holds any of the subject, in each prompt and answer together."""
    if len(subjects) != len(pairs):
        raise ValueError(f"subjects has {len(subjects)} entries for {len(pairs)} pairs")
    if not any(subjects):
        return [None] * len(pairs)
    texts = [f"{prompt} {answer}" for prompt, answer in pairs]
    if tokenizer.is_fast:
        offsets = _plain(tokenizer, texts, offsets=True)["offset_mapping"]
        return [
            None if span is None else _covering(spans, span[1])
            for spans, span in zip(offsets, subjects, strict=True)
        ]
    upto = [text[: span[1]] if span else text for text, span in zip(texts, subjects, strict=True)]
    lengths = [len(ids) for ids in _plain(tokenizer, upto)["input_ids"]]
    return [
        None if span is None or not size else size - 1
        for size, span in zip(lengths, subjects, strict=True)
    ]


def _covering(offsets: list[tuple[int, int]], end: int) -> int | None:
    """Index of the last token that begins before the character ``end``."""
    last = bisect_left(offsets, end, key=lambda span: span[0]) - 1
    return last if last >= 0 else None


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids and attention, int64 [N, S], of ``prompts`` padded on the left, ready to generate."""
    prompts = list(prompts)
    sequences = _plain(tokenizer, prompts)["input_ids"] if prompts else []
    front = _front(tokenizer)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        if not front and not sequence:
            raise ValueError(f"prompt {prompt!r} has no tokens")
    sequences = [front + sequence for sequence in sequences]
    ids, attention, _ = _pad(sequences, pad_id(tokenizer), "left")
    return ids, attention


def pad_id(tokenizer: Any) -> int:
    """The id that fills up a batch: of padding, else of the end of sequence, else 0."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in ids if i is not None)


def _plain(tokenizer: Any, texts: list[str], offsets: bool = False) -> Any:
    """The tokenizer's own batch call, without special tokens."""
    return tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=offsets,
        verbose=False,
    )


def _front(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text (those behind it are not wanted)."""
    for sample in ("a", "1", "."):  # a small vocabulary may lack one of them
        plain = tokenizer(sample, add_special_tokens=False)["input_ids"]
        if plain:
            full = tokenizer(sample)["input_ids"]
            size = len(plain)
            found = (i for i in range(len(full)) if full[i : i + size] == plain)
            return list(full[: next(found, 0)])
    return []


def _joined(tokenizer: Any, pairs: list[tuple[str, str]]) -> tuple[list[list[int]], list[int]]:
    """Ids of each prompt and answer together, and the index of the answer's first token."""
    if not pairs:
        return [], []
    texts = [f"{prompt} {answer}" for prompt, answer in pairs]
    if tokenizer.is_fast:
        encoded = _plain(tokenizer, texts, offsets=True)
        spans = zip(encoded["offset_mapping"], pairs, strict=True)
        return encoded["input_ids"], [
            _first(offsets, len(prompt)) for offsets, (prompt, _) in spans
        ]
    whole = _plain(tokenizer, texts)["input_ids"]
    alone = _plain(tokenizer, [prompt for prompt, _ in pairs])["input_ids"]
    return whole, [_shared(a, b) for a, b in zip(whole, alone, strict=True)]


def _first(offsets: list[tuple[int, int]], end: int) -> int:
    """Index of the first token that reaches beyond ``end``, where the prompt's characters stop;
    one that spans the prompt's last characters and the space alone holds nothing of the answer."""
    first = bisect_right(offsets, end, key=lambda span: span[1])
    if first < len(offsets) and offsets[first][0] < end and offsets[first][1] == end + 1:
        first += 1
    return first


def _shared(a: list[int], b: list[int]) -> int:
    """Length of the common prefix."""
    unequal = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(unequal, min(len(a), len(b)))


def _pad(sequences: list[list[int]], fill: int, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention, and each column's place in its sequence (< 0 in padding on the left)."""
    if side not in ("left", "right"):
        raise ValueError(f"padding_side={side!r}: valid are left, right")
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.long).view(-1, 1)
    width = int(lengths.max()) if sequences else 0
    position = torch.arange(width).expand(len(sequences), width)
    if side == "left":
        position = position - (width - lengths)
    attention = ((position >= 0) & (position < lengths)).long()
    ids = torch.full((len(sequences), width), fill, dtype=torch.long)
    ids[attention.bool()] = torch.tensor(list(chain.from_iterable(sequences)), dtype=torch.long)
    return ids, attention, position
