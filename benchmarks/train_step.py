"""Seconds per training edit: ours beside the published procedure, in one run on one machine.

    make bench                                    # hidden 256, intermediate 688, 12 layers
    python benchmarks/train_step.py --hidden 1024 --intermediate 4096 --edits 12

Both train a policy and a hypernetwork on the same random edits of the same randomly initialised
Llama, 12 editable modules, ``back_depth`` 10 reached before the clock starts. The two are timed in
alternation, so that a machine that slows down slows both. First the run checks that both see the
same signals and that our commit is what the functional shift said; if not, no speed is reported.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models import TokenisedEdit, mlp_inputs, random_edits, random_llama  # noqa: E402
from benchmarks.published import PublishedTrainer  # noqa: E402
from hiedit.backbone.model import Backbone  # noqa: E402
from hiedit.backbone.signals import Probe  # noqa: E402
from hiedit.catalogue import load_method  # noqa: E402
from hiedit.config import TrainConfig  # noqa: E402
from hiedit.data.tokens import encode  # noqa: E402
from hiedit.methods import build_method  # noqa: E402
from hiedit.types import IGNORE, EditBatch, EditRequest, Locality  # noqa: E402

SOLVERS = {"outer": ("outer", "all", 2), "lstsq": ("least_squares", "answer", 4)}
DEPTH = 10  # edits in the reward, the current one included


def word_tokenizer(vocab: int):
    """A tokenizer whose word ``t17`` is token 17, so that text stands for given tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="t0", pad_token="t0", eos_token="t0"
    )


def as_request(edit: TokenisedEdit) -> EditRequest:
    """The same edit in words."""

    def text(sequence) -> tuple[str, str]:
        ids, labels = sequence[0][0], sequence[1][0]
        answer = labels != IGNORE
        words = [" ".join(f"t{i}" for i in part.tolist()) for part in (ids[~answer], ids[answer])]
        return words[0], words[1]

    prompt, target = text(edit.edit)
    paraphrase, _ = text(edit.paraphrase)
    near, answer = text(edit.locality)
    return EditRequest(prompt, target, (paraphrase,), (Locality(near, answer),))


class Ours:
    """HiEdit's training step on the paper's composition; at_once: see ``ObjectiveConfig``."""

    def __init__(
        self, model, tokenizer, modules: list[str], solver: str, rank: int, at_once: int = 0
    ):
        kind, tokens, blocks = SOLVERS[solver]
        paper = load_method("hiedit-paper")
        method = replace(
            paper,
            updater=replace(
                paper.updater, solver=kind, tokens=tokens, rank=rank, blocks=blocks, eta=1e-6
            ),
            objective=replace(paper.objective, back_depth=DEPTH - 1, c_reg=1e-2, at_once=at_once),
        )
        self.backbone = Backbone(model, tokenizer, modules)
        self.trainer = build_method(self.backbone, method).trainer(TrainConfig())

    def train_edit(self, edit: TokenisedEdit) -> None:
        self.trainer.edit(EditBatch((as_request(edit),)))


def check(ours: Ours, published: PublishedTrainer, edit: TokenisedEdit, solver: str) -> float:
    """Largest relative difference of the two's signals, and of the weights ours commits from
    those its functional shift implies."""
    request = as_request(edit)
    batch = encode(ours.backbone.tokenizer, [(request.prompt, request.target)], padding_side="left")
    signals = Probe(ours.backbone, batch, 1, SOLVERS[solver][1]).signals()
    published._capture(edit.edit)
    worst = 0.0
    for name in ours.backbone.names:
        keys, grads = published._load(name)
        for mine, theirs in ((signals.keys[name], keys), (signals.grads[name], grads)):
            worst = max(worst, float((mine - theirs).abs().max() / theirs.abs().max()))
    rollout = ours.trainer.rollout
    before = {n: m.weight.detach().clone() for n, m in ours.backbone.modules.items()}
    outcome = rollout.step(EditBatch((request,)))
    for name, shift in outcome.shifts.items():
        wanted = before[name] + shift.dense()
        gap = (ours.backbone.modules[name].weight - wanted).abs().max() / wanted.abs().max()
        worst = max(worst, float(gap))
    rollout.reset()
    return worst


def measure(solver: str, args) -> dict[str, float]:
    """Median seconds per training edit of both, after warming up to full depth."""
    dtype = getattr(torch, args.dtype)
    model = random_llama(
        args.hidden,
        args.intermediate,
        args.layers,
        vocab=args.vocab,
        dtype=dtype,
        device=args.device,
    )
    middle = range(args.layers // 3, args.layers // 3 + 6)
    modules = mlp_inputs(middle)
    edits = [e.to(args.device) for e in random_edits(DEPTH + 2 + args.edits, args.vocab)]
    ours = Ours(copy.deepcopy(model), word_tokenizer(args.vocab), modules, solver, args.rank)
    settings = dict(solver=solver, rank=args.rank, blocks=SOLVERS[solver][2])
    released = PublishedTrainer(copy.deepcopy(model), modules, as_released=True, **settings)
    theirs = PublishedTrainer(model, modules, **settings)
    gap = check(ours, theirs, edits[0], solver)
    if not gap < (1e-3 if dtype == torch.float32 else 5e-2):
        sys.exit(f"{solver}: the two disagree by {gap:.1e}; no speed is reported")
    trainers = {"released": released, "published": theirs, "ours": ours}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for index, edit in enumerate(edits):
        for name, trainer in trainers.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            trainer.train_edit(edit)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if index >= DEPTH + 2:
                seconds[name].append(time.perf_counter() - start)
        print(f"\r{solver}: edit {index + 1}/{len(edits)}", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return medians | {"gap": gap, "forwards": theirs.counts.forwards}


def main() -> None:
    """Measure both solvers and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (("hidden", 256), ("intermediate", 688), ("layers", 12), ("vocab", 3000)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--edits", type=int, default=4, help="timed edits")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--solvers", default="outer,lstsq")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.dtype}, "
        f"Llama {args.layers} x {args.hidden}/{args.intermediate}, 12 modules, rank {args.rank}"
    )
    rows = {solver: measure(solver, args) for solver in args.solvers.split(",")}
    print("seconds per training edit, medians; signals of all three agree")
    print(f"{'solver':<8}{'as released':>13}{'straightforward':>17}{'ours':>9}{'ratios':>18}")
    for solver, row in rows.items():
        first, second = (row[name] / row["ours"] for name in ("released", "published"))
        print(
            f"{solver:<8}{row['released']:>13.3f}{row['published']:>17.3f}{row['ours']:>9.3f}"
            f"{first:>9.1f}x{second:>7.1f}x"
        )
    print(
        "straightforward: the published procedure with dense gradients of the edited weights alone "
        f"({row['forwards']} forwards a step)\nas released: with gradients of all parameters, "
        "graphs for its advantage and signals through the disk, like the released code"
    )


if __name__ == "__main__":
    main()
