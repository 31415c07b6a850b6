"""Text of the model's own: what it writes when nobody asks for anything.

Edits must leave more alone than the prompts that someone thought of. A model's own samples stand
for the text that it was trained on where that is not at hand (as MEMIT's covariance needs a
corpus: Meng et al. 2023, section 4.1).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GenerationConfig

from hiedit.backbone.model import Backbone
from hiedit.durable import write_text
from hiedit.knowledge.kept import worth_keeping
from hiedit.models.cache import cache_dir
from hiedit.models.identity import fingerprint

Pair = tuple[str, str]  # beginning and ending
Tell = Callable[[int, int], None]  # texts done, of how many
_RECENT: dict[str, tuple[Pair, ...]] = {}
TOP = 50  # tokens that each is drawn from
TOKENS = 48  # of one text
BATCH = 64
FEWEST_WORDS = 6


def own_text(
    backbone: Backbone, count: int, seed: int = 0, tell: Tell = lambda done, total: None
) -> tuple[Pair, ...]:
    """About ``count`` texts of ``TOKENS`` tokens that the model writes from nothing, by top-k
    sampling, each as its beginning and its last word; the same for the same seed. Texts of fewer
    than ``FEWEST_WORDS`` words are left out. Those of a large model are kept in the cache, the last
    few of any model in memory."""
    tokenizer = backbone.tokenizer
    of = f"{fingerprint(backbone.model)[:24]}-{type(tokenizer).__name__}-{len(tokenizer)}"
    name = f"{of}-{count}-{seed}.json"
    if name not in _RECENT:
        _RECENT[name] = _kept(backbone, name, count, seed, tell)
        while len(_RECENT) > 4:
            _RECENT.pop(next(iter(_RECENT)))
    return _RECENT[name]


def _kept(backbone: Backbone, name: str, count: int, seed: int, tell: Tell) -> tuple[Pair, ...]:
    """Return what the cache holds under ``name``, or what is written now, and kept there."""
    if not worth_keeping(backbone):  # a small one writes faster than it is looked up
        return _written(backbone, count, seed, tell)
    path = cache_dir() / "text" / name
    try:
        return tuple((str(a), str(b)) for a, b in json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        found = _written(backbone, count, seed, tell)
    with contextlib.suppress(OSError):  # it only saves time
        write_text(path, json.dumps(found))
    return found


@torch.no_grad()
def _written(backbone: Backbone, count: int, seed: int, tell: Tell) -> tuple[Pair, ...]:
    found: list[Pair] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, count, BATCH):
            tell(start, count)
            rows = _sample(backbone, min(BATCH, count - start))
            found += [pair for row in rows if (pair := _pair(backbone.tokenizer, row))]
    tell(count, count)
    return tuple(found)


def _sample(backbone: Backbone, count: int) -> Tensor:
    """int64 [count, TOKENS + 1], the token that begins a text first."""
    begin = _begin(backbone.tokenizer)
    ids = torch.full((count, 1), begin, device=backbone.device)
    model, own = backbone.model, backbone.model.generation_config
    # In place of the model's own, which ``generate`` would fill up a given one with.
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=TOP, pad_token_id=begin, bos_token_id=begin,
        eos_token_id=own.eos_token_id,
    )  # fmt: skip
    try:
        return model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS
        ).cpu()
    finally:
        model.generation_config = own


def _begin(tokenizer) -> int:
    """Return what a document begins after: the end of the one before it, where the tokenizer says
    so."""
    special = set(tokenizer.all_special_tokens)
    for token in ("<|endoftext|>", "<s>", "<bos>", "<|begin_of_text|>"):
        if token in special:
            return tokenizer.convert_tokens_to_ids(token)
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in known if i is not None)


def _pair(tokenizer, row: Tensor) -> Pair | None:
    words = tokenizer.decode(row[1:], skip_special_tokens=True).split()
    # The last word may have been cut off.
    return (" ".join(words[:-2]), words[-2]) if len(words) >= FEWEST_WORDS else None
