"""Builds the embedded world: facts -> sentences -> tokenizer -> a small Llama that knows them.

    build_world(out_dir, seed=0)      # about a quarter of an hour on two CPU cores

Writes what ``AutoModelForCausalLM`` and ``AutoTokenizer`` load, with ``facts.json`` and
``world.json`` (recipe, versions, measured recall) beside it. Same seed, libraries and machine:
same world.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hiedit.world.corpus import Sentences, batches, sentences, tokenise
from hiedit.world.facts import Fact, collect_facts, load_facts, save_facts
from hiedit.world.optim import make_optimizers
from hiedit.world.recall import measure_recall
from hiedit.world.tokenizer import VOCABULARY, train_tokenizer

SHIPPED_FACTS = Path(__file__).parent / "assets" / "facts.json"


@dataclass(frozen=True)
class Recipe:
    """Size and training of the world model; learning rates are constant, then fall to zero."""

    layers: int = 8
    hidden: int = 192
    intermediate: int = 576
    heads: int = 6
    steps: int = 831
    batch: int = 128  # sentences
    prompt_weight: float = 0.2
    muon_lr: float = 0.03
    adam_lr: float = 3e-3
    momentum: float = 0.95
    newton_schulz: int = 4
    decay_from: float = 0.45  # fraction of the steps


def build_world(
    out_dir: str | Path,
    seed: int = 0,
    progress: bool = True,
    steps: int | None = None,
    facts: Sequence[Fact] | None = None,
    threads: int = 2,
) -> dict:
    """Trains the world model and writes it to ``out_dir``.

    Args:
        out_dir: directory to write to; made if missing.
        seed: of the initial weights and of the order of the sentences.
        progress: show a progress bar with rate and remaining time.
        steps: optimiser steps instead of the recipe's (fewer: a model that knows little).
        facts: what to teach; by default the packaged facts. ``facts.collect_facts()`` collects
            them anew from the libraries of ``hiedit[world]``.
        threads: CPU threads while training; part of what the numbers depend on.

    Returns:
        The measured recalls of the saved bf16 weights (``recall.measure_recall``).
    """
    out_dir = Path(out_dir)
    recipe = Recipe() if steps is None else Recipe(steps=steps)
    if facts is None:
        facts = load_facts(SHIPPED_FACTS) if SHIPPED_FACTS.exists() else collect_facts()
    facts = sorted(facts)
    out_dir.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    pairs = sentences(facts)
    tokenizer = train_tokenizer(f"{prompt} {answer}" for prompt, answer in pairs)
    data = tokenise(pairs, tokenizer, recipe.prompt_weight)
    with use_threads(threads), quiet_transformers():
        model = _new_model(recipe, tokenizer, seed)
        loss = _train(model, data, recipe, seed, progress)
        seconds = time.perf_counter() - started
        model.to(torch.bfloat16).save_pretrained(out_dir)
        tokenizer.save_pretrained(out_dir)
        recall = _measure(out_dir, tokenizer, facts)
    save_facts(facts, out_dir / "facts.json")
    record = {
        "seed": seed,
        "facts": len(facts),
        "recipe": asdict(recipe),
        "loss": round(loss, 5),
        "training_seconds": round(seconds),
        "versions": _versions(),
        "recall": recall,
    }
    (out_dir / "world.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return recall


def _new_model(recipe: Recipe, tokenizer, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
    model.generation_config.max_new_tokens = 16  # the longest answer has fewer tokens
    model.generation_config.do_sample = False
    return model


def _train(model, data: Sentences, recipe: Recipe, seed: int, progress: bool) -> float:
    """Runs the recipe; returns the mean loss of the last tenth (nats per weighted token)."""
    optimizers = make_optimizers(
        model, recipe.muon_lr, recipe.adam_lr, recipe.momentum, recipe.newton_schulz
    )
    rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
    order = batches(data, recipe.batch, torch.Generator().manual_seed(seed))
    model.train()
    losses = []
    with progress_bar(recipe.steps, progress) as advance:
        for step in range(recipe.steps):
            factor = _schedule(step, recipe)
            for optimizer, base in zip(optimizers, rates, strict=True):
                for group, rate in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = rate * factor
            loss = _loss(model, data, next(order))
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            advance(losses[-1])
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def _loss(model, data: Sentences, rows: torch.Tensor) -> torch.Tensor:
    """Weighted next-token cross-entropy of the sentences ``rows`` (nats per unit of weight)."""
    width = int(data.length[rows].max())
    ids, weight = data.ids[rows, :width], data.weight[rows, 1:width]
    # Padding is on the right and carries no weight: causal attention needs no mask for it.
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (nll * weight.flatten()).sum() / weight.sum()


def _schedule(step: int, recipe: Recipe) -> float:
    done = step / recipe.steps
    return min(1.0, (1 - done) / (1 - recipe.decay_from))


def _measure(out_dir: Path, tokenizer, facts: list[Fact]) -> dict:
    """Recall of the weights as saved, computed in fp32 (faster on a CPU than bf16)."""
    model = AutoModelForCausalLM.from_pretrained(out_dir, dtype=torch.float32)
    return measure_recall(model, tokenizer, facts)


def _versions() -> dict[str, str]:
    import tokenizers
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


@contextmanager
def use_threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet_transformers():
    """No progress bars for writing and reading nine megabytes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def progress_bar(steps: int, show: bool, what: str = "building the world"):
    """Yields ``advance(loss)``: a bar on a terminal, a line now and then elsewhere."""
    if show and sys.stderr.isatty():
        try:
            import rich  # noqa: F401
        except ImportError:
            pass
        else:
            with _rich_bar(steps, what) as advance:
                yield advance
            return
    started, done = time.perf_counter(), 0

    def advance(loss: float) -> None:
        nonlocal done
        done += 1
        if show and (done % max(1, steps // 20) == 0 or done == steps):
            rate = done / (time.perf_counter() - started)
            remaining = (steps - done) / rate / 60
            line = f"step {done}/{steps}  loss {loss:.3f}  {rate:.2f} steps/s"
            print(f"{line}  {remaining:.1f} min left", file=sys.stderr, flush=True)

    yield advance


@contextmanager
def _rich_bar(steps: int, what: str):
    from rich import progress as rp
    from rich.console import Console

    columns = (
        rp.TextColumn(what),
        rp.BarColumn(),
        rp.MofNCompleteColumn(),
        rp.TextColumn("{task.fields[rate]}  loss {task.fields[loss]}"),
        rp.TimeRemainingColumn(),
    )
    with rp.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=steps, loss="-", rate="-")

        def advance(loss: float) -> None:
            speed = bar.tasks[0].speed
            rate = f"{speed:.2f} steps/s" if speed else "-"
            bar.update(task, advance=1, loss=f"{loss:.3f}", rate=rate)

        yield advance
