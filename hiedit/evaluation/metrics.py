"""Is a prompt answered as wanted? Decided by the text of greedy generation, mostly without any.

When every token of the answer is the most likely one, fed the answer so far, then greedy
generation says it, and the token after it tells whether it goes on in the same word. Where one is
not, the token that takes its place mostly rules the answer out. What is left, an answer that may
still come about by other tokens, after a line break, or before more of a number, is generated.
So one forward pass scores what a generation loop would (the tests compare the two).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hiedit.backbone.model import Backbone
from hiedit.data.tokens import encode_prompts, pad_id
from hiedit.evaluation.reading import Path, Reading, paths, read
from hiedit.evaluation.words import Match, match

SILENCE = "."
MARGIN = 8  # tokens generated beyond twice the answer's, where text has to decide
ROUNDS = 3  # up to so many tokens are found by as many passes over the whole sequence

Pair = tuple[str, str]  # prompt and answer


@dataclass(frozen=True)
class Answered:
    """Per prompt: begins [N] bool (free greedy generation begins with the answer, at a word
    boundary), exact [N] bool (and ends there, or goes on with punctuation), accuracy [N] (share of
    the answer's tokens that are the most likely one, teacher-forced)."""

    begins: Tensor
    exact: Tensor
    accuracy: Tensor


def answered(backbone: Backbone, pairs: Sequence[Pair], batch: int = 128) -> Answered:
    """Score (prompt, answer) pairs on the model as it is now."""
    found = read(backbone, paths(backbone.tokenizer, pairs, after=True), batch)
    matches = decide(backbone, pairs, found, batch)
    return Answered(
        torch.tensor([m.begins for m in matches], dtype=torch.bool),
        torch.tensor([m.ends for m in matches], dtype=torch.bool),
        torch.tensor([r.accuracy for r in found], dtype=torch.float32),
    )


def decide(
    backbone: Backbone, pairs: Sequence[Pair], found: Sequence[Reading], batch: int = 128
) -> list[Match]:
    """Return what free greedy generation makes of each pair, given the ``Reading`` of its path with
    what follows it (``paths(..., after=True)``); generates where that does not tell."""
    plain = _plain_prompts(backbone, [prompt for prompt, _ in pairs])
    special = frozenset(backbone.tokenizer.all_special_ids)
    matches = [
        _seen(backbone.tokenizer, special, reading, answer.strip(), start)
        for (_, answer), reading, start in zip(pairs, found, plain, strict=True)
    ]
    open_ = [i for i, m in enumerate(matches) if m.begins is None or m.ends is None]
    counts = [2 * len(found[i].path.answer) + MARGIN for i in open_]
    said = _generated(backbone, [pairs[i][0] for i in open_], counts, batch)
    for i, ids in zip(open_, said, strict=True):
        matches[i] = match(_text(backbone.tokenizer, special, ids), pairs[i][1])
    return matches


def _seen(
    tokenizer, special: frozenset[int], reading: Reading, answer: str, prompt: tuple[int, ...]
) -> Match:
    """Return what can be told without generating. prompt: its tokens when it stands alone."""
    path, hits = reading.path, reading.hits
    whole = _text(tokenizer, special, path.answer).strip()
    if path.ids[: path.start] != prompt or whole != answer:
        return Match(None, None)  # joined to the answer the prompt has other tokens
    right = next((i for i, hit in enumerate(hits) if not hit), len(hits))
    ids = (*path.answer[:right], reading.best[right])
    return match(_text(tokenizer, special, ids), answer, complete=ids[-1] in special)


def _text(tokenizer, special: frozenset[int], ids: Sequence[int]) -> str:
    """``ids`` up to the first ``special`` token, as text."""
    end = next((i for i, token in enumerate(ids) if token in special), len(ids))
    return tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False)


def _plain_prompts(backbone: Backbone, prompts: Sequence[str]) -> list[tuple[int, ...]]:
    distinct = list(dict.fromkeys(prompts))
    ids, attention = encode_prompts(backbone.tokenizer, distinct)
    lengths = attention.sum(1).tolist()
    rows = [tuple(row[len(row) - n :]) for row, n in zip(ids.tolist(), lengths, strict=True)]
    known = dict(zip(distinct, rows, strict=True))
    return [known[prompt] for prompt in prompts]


def generate(
    backbone: Backbone, prompts: Sequence[str], max_new_tokens: int = 12, batch: int = 128
) -> list[str]:
    """Greedy answers of the model as it is now, cut at the end of text or of the line."""
    counts = [max_new_tokens] * len(prompts)
    said = _generated(backbone, prompts, counts, batch)
    special = frozenset(backbone.tokenizer.all_special_ids)
    texts = (_text(backbone.tokenizer, special, ids) for ids in said)
    return [text.strip().split("\n")[0].strip() for text in texts]


@torch.no_grad()
def _generated(
    backbone: Backbone, prompts: Sequence[str], counts: Sequence[int], batch: int = 128
) -> list[tuple[int, ...]]:
    """The ``counts[i]`` tokens that the model goes on with, fewer where it ends (then the last one
    is the end's)."""
    order = sorted(range(len(prompts)), key=lambda i: counts[i])
    said: dict[int, tuple[int, ...]] = {}
    for start in range(0, len(order), batch):
        group = order[start : start + batch]
        ids, attention = encode_prompts(backbone.tokenizer, [prompts[i] for i in group])
        with greedy_decoding(backbone.model, pad_id(backbone.tokenizer)):
            out = backbone.model.generate(
                input_ids=ids.to(backbone.device),
                attention_mask=attention.to(backbone.device),
                max_new_tokens=counts[group[-1]],
            )
        for i, row in zip(group, out[:, ids.shape[1] :].tolist(), strict=True):
            said[i] = until_end(backbone, row[: counts[i]])
    return [said[i] for i in range(len(prompts))]


@contextlib.contextmanager
def greedy_decoding(model, padding: int) -> Iterator[None]:
    """Have ``model.generate`` take the most likely token, whatever its ``generation_config``
    says (samples, beams, penalties, forced or suppressed tokens); only where a text ends is
    taken from there."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, pad_token_id=padding, eos_token_id=own.eos_token_id
    )
    try:
        yield
    finally:
        model.generation_config = own


def _ends(backbone: Backbone) -> set[int]:
    """The tokens that end a text."""
    named = (backbone.model.generation_config.eos_token_id, backbone.tokenizer.eos_token_id)
    return {i for n in named if n is not None for i in (n if isinstance(n, list) else [n])}


def ends_text(backbone: Backbone, token: int) -> bool:
    return token in _ends(backbone)


def until_end(backbone: Backbone, ids: Sequence[int]) -> tuple[int, ...]:
    """``ids`` up to the first that ends a text, with it."""
    ends = _ends(backbone)
    stop = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return tuple(ids[:stop])


def continuations(
    backbone: Backbone, prompts: Sequence[str], counts: Sequence[int], batch: int = 128
) -> list[Path]:
    """Each prompt with the ``counts[i]`` tokens that the model as it is now goes on with, fewer
    where it ends."""
    ends, plain = _ends(backbone), _plain_prompts(backbone, prompts)
    said: list[tuple[int, ...]] = [()] * len(prompts)
    long = [i for i, count in enumerate(counts) if count > ROUNDS]
    for i, ids in zip(
        long,
        _generated(backbone, [prompts[i] for i in long], [counts[i] for i in long], batch),
        strict=True,
    ):
        said[i] = ids
    for _ in range(ROUNDS):
        growing = [
            i
            for i, ids in enumerate(said)
            if counts[i] <= ROUNDS and len(ids) < counts[i] and not ends & set(ids)
        ]
        asked = [Path((*plain[i], *said[i], 0), len(plain[i]) + len(said[i])) for i in growing]
        for i, reading in zip(growing, read(backbone, asked, batch), strict=True):
            said[i] += reading.best
    return [Path(p + ids, len(p)) for p, ids in zip(plain, said, strict=True)]
