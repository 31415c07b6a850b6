"""Recall: how many of its facts a model knows."""

from __future__ import annotations

from collections import defaultdict

import torch

from hiedit.types import IGNORE
from hiedit.world.corpus import heldout_prompt, seen_prompts, tokenise
from hiedit.world.facts import Fact


@torch.no_grad()
def knows(model, tokenizer, pairs: list[tuple[str, str]], batch: int = 256) -> torch.Tensor:
    """bool [N]: does greedy generation from each prompt give exactly the answer, and then stop?

    One pass each: greedy decoding yields the answer and ``</s>`` exactly when each of those tokens
    is the most likely one after the ones before it.
    """
    data = tokenise(pairs, tokenizer)
    known = []
    for rows in data.length.argsort(stable=True).split(batch):
        width = int(data.length[rows].max())
        logits = model(data.ids[rows, :width]).logits[:, :-1]
        gold = data.answers()[rows, 1:width]
        known.append(((logits.argmax(-1) == gold) | (gold == IGNORE)).all(1))
    result = torch.empty(len(pairs), dtype=torch.bool)
    result[data.length.argsort(stable=True)] = torch.cat(known)
    return result


def measure_recall(model, tokenizer, facts: list[Fact]) -> dict:
    """Recall in [0, 1] by exact match of the greedy answer, over all facts and per relation.

    ``seen`` is the fraction of (fact, seen phrasing) pairs, ``seen_all`` that of the facts known
    in *every* seen phrasing, ``heldout`` the fraction of facts in the held-out phrasing.
    """
    was_training = model.training
    model.eval()
    pairs = [(fact, p) for fact in facts for p in seen_prompts(fact)]
    seen = knows(model, tokenizer, [(p, f.answer) for f, p in pairs]).tolist()
    heldout = knows(model, tokenizer, [(heldout_prompt(f), f.answer) for f in facts]).tolist()
    model.train(was_training)
    by_fact: dict[Fact, list[bool]] = defaultdict(list)
    for (fact, _), known in zip(pairs, seen, strict=True):
        by_fact[fact].append(known)
    rows = [(f.relation, by_fact[f], h) for f, h in zip(facts, heldout, strict=True)]
    relations = sorted({fact.relation for fact in facts})
    return {
        **_summary(rows),
        "relations": {r: _summary([row for row in rows if row[0] == r]) for r in relations},
    }


def _summary(rows: list[tuple[str, list[bool], bool]]) -> dict:
    flat = [known for _, seen, _ in rows for known in seen]
    return {
        "facts": len(rows),
        "seen": round(sum(flat) / len(flat), 5),
        "seen_all": round(sum(all(seen) for _, seen, _ in rows) / len(rows), 5),
        "heldout": round(sum(heldout for _, _, heldout in rows) / len(rows), 5),
    }
