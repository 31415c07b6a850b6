"""What shifts on trial cost a forward pass: functional ones, beside dense W + BA and none at all.

    python benchmarks/forward_shift.py                    # hidden 256, intermediate 688, 12 layers
    python benchmarks/forward_shift.py --hidden 4096 --intermediate 14336 --layers 32 --heads 32 \\
        --kv-heads 8 --vocab 128256 --dtype bfloat16 --device cuda      # Llama-3-8B's shape

One padded batch of the reward's size (20 sequences) goes through the model with a shift at each of
12 modules. Columns, milliseconds:

plain        no shift at all: what the model costs anyway.
functional   y = x W^T + (x A^T) B^T by hooks; no weight is touched. Several passes of one edit are
             stacked on each other.
dense        W + BA is formed for every module, the plain forward runs, W is put back: what applying
             and reverting costs, and the copies of W it needs.
gradient     forward and backward to A and B through the functional shift, and, beside it, through
             dense W + BA, whose gradient is an [O, I] matrix for every module.

The two ways' logits and gradients are compared first: where they disagree, nothing is reported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models import mlp_inputs, random_edits, random_llama  # noqa: E402
from benchmarks.timing import alternate, machine, medians, options, prepared, table  # noqa: E402
from benchmarks.train_step import as_request, word_tokenizer  # noqa: E402
from hiedit.backbone.losses import answer_nll  # noqa: E402
from hiedit.backbone.model import Backbone  # noqa: E402
from hiedit.data.tokens import encode  # noqa: E402
from hiedit.types import Shift, TokenBatch  # noqa: E402

Stacks = dict[str, list[Shift]]


class Case:
    """One model, one batch, and every way to push the batch through it with shifts in place."""

    def __init__(self, backbone: Backbone, batch: TokenBatch):
        self.backbone, self.batch = backbone, batch
        self.kept = {n: m.weight.detach().clone() for n, m in backbone.modules.items()}

    def stacks(self, rank: int, passes: int) -> Stacks:
        """``passes`` random shifts of rank ``rank`` for every module, together 1% of its weight; as
        large as the weight in half precision, where the dense way rounds smaller ones away."""
        g = torch.Generator().manual_seed(rank * 1000 + passes)
        made: Stacks = {}
        for name, module in self.backbone.modules.items():
            weight = self.kept[name]
            share = 0.01 if weight.dtype == torch.float32 else 1.0
            size = share * float(weight.float().std()) / (rank * passes) ** 0.5
            made[name] = [
                Shift(
                    torch.randn(rank, module.in_features, generator=g).to(self.backbone.device),
                    torch.randn(module.out_features, rank, generator=g).to(self.backbone.device)
                    * size,
                )
                for _ in range(passes)
            ]
        return made

    @torch.no_grad()
    def plain(self) -> Tensor:
        return self.backbone.answers(self.batch).logits

    @torch.no_grad()
    def functional(self, stacks: Stacks) -> Tensor:
        with self.backbone.shifted(stacks):
            return self.backbone.answers(self.batch).logits

    @torch.no_grad()
    def dense(self, stacks: Stacks) -> Tensor:
        for name, stack in stacks.items():
            weight = self.backbone.modules[name].weight
            for shift in stack:
                weight += shift.dense().to(weight.dtype)
        logits = self.plain()
        for name, weight in self.kept.items():
            self.backbone.modules[name].weight.copy_(weight)
        return logits

    def functional_gradient(self, stacks: Stacks) -> list[Tensor]:
        """Of A and B of every module's last pass."""
        leaves = _leaves(stacks)
        with self.backbone.shifted(stacks):
            loss = answer_nll(self.backbone.answers(self.batch)).sum()
        return list(torch.autograd.grad(loss, leaves))

    def dense_gradient(self, stacks: Stacks) -> list[Tensor]:
        leaves = _leaves(stacks)
        weights = {}
        for name, stack in stacks.items():
            added = sum(shift.dense() for shift in stack)
            weights[f"{name}.weight"] = self.kept[name] + added.to(self.kept[name].dtype)
        loss = functional_call(_Loss(self.backbone), {f"model.{n}": w for n, w in weights.items()},
                               (self.batch,))  # fmt: skip
        return list(torch.autograd.grad(loss, leaves))

    def gap(self, stacks: Stacks) -> float:
        """Largest relative difference between the two ways, of what the shifts change and of the
        gradients."""
        plain = self.plain()
        changes = [way(stacks) - plain for way in (self.functional, self.dense)]
        pairs = [changes, *zip(self.functional_gradient(stacks), self.dense_gradient(stacks),
                               strict=True)]  # fmt: skip
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)


class _Loss(torch.nn.Module):
    """The loss as a module, whose weights ``functional_call`` can replace."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.model, self.backbone = backbone.model, backbone

    def forward(self, batch: TokenBatch) -> Tensor:
        return answer_nll(self.backbone.answers(batch)).sum()


def _leaves(stacks: Stacks) -> list[Tensor]:
    last = [stack[-1] for stack in stacks.values()]
    return [t.requires_grad_() for shift in last for t in (shift.A, shift.B)]


def measure(case: Case, rank: int, passes: int, args: argparse.Namespace) -> list[str]:
    """One row of the table."""
    stacks = case.stacks(rank, passes)
    gap = case.gap(stacks)
    if not gap < (1e-3 if args.dtype == "float32" else 0.2):
        sys.exit(f"rank {rank}, {passes} passes: functional and dense disagree by {gap:.1e}; "
                 "no speed is reported")  # fmt: skip
    ways = {
        "plain": lambda _: case.plain(),
        "functional": lambda _: case.functional(stacks),
        "dense": lambda _: case.dense(stacks),
        "gradient": lambda _: case.functional_gradient(stacks),
        "dense gradient": lambda _: case.dense_gradient(stacks),
    }
    t = medians(alternate(ways, args.repeats, args.device, warmup=2, clock=args.clock))
    return [
        f"{rank} x {passes}", *(f"{1e3 * value:.2f}" for value in t.values()),
        f"{t['functional'] / t['plain'] - 1:+.0%}", f"{t['dense'] / t['functional']:.2f}x",
        f"{t['dense gradient'] / t['gradient']:.2f}x", f"{gap:.0e}",
    ]  # fmt: skip


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options(__doc__, "hidden 64, intermediate 176, 8 layers, one row")
    sizes = (("hidden", 256), ("intermediate", 688), ("layers", 12), ("heads", 4), ("vocab", 3000))
    for name, value in sizes:
        parser.add_argument(f"--{name}", type=int, default=value, help=f"of the model ({value})")
    parser.add_argument("--kv-heads", type=int, help="of the model (as many as --heads)")
    parser.add_argument(
        "--ranks", default="4,20,64", help="of one shift, its edit tokens (4,20,64)"
    )
    parser.add_argument("--passes", default="1,10", help="shifts on each other (1,10)")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds (15)")
    args = prepared(parser, argv)
    if args.quick:
        args.hidden, args.intermediate, args.layers, args.vocab = 64, 176, 8, 500
        args.ranks, args.passes, args.repeats = "4", "3", 3
    args.ranks, args.passes = ([int(n) for n in x.split(",")] for x in (args.ranks, args.passes))
    if args.layers < 8 or min(*args.ranks, *args.passes, args.repeats) < 1:
        parser.error(f"--layers {args.layers} must be at least 8; ranks, passes and repeats 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every rank and number of passes and print one table."""
    args = arguments(argv)
    dtype = getattr(torch, args.dtype)
    model = random_llama(
        args.hidden, args.intermediate, args.layers, args.heads, args.vocab, dtype, args.kv_heads,
        args.device,
    )  # fmt: skip
    modules = mlp_inputs(range(args.layers // 3, args.layers // 3 + 6))
    backbone = Backbone(model, word_tokenizer(args.vocab), modules)
    pairs = [(r.prompt, r.target) for r in map(as_request, random_edits(20, args.vocab))]
    batch = encode(backbone.tokenizer, pairs, padding_side="left").to(args.device)
    case = Case(backbone, batch)
    print(
        f"{machine(args)}, Llama {args.layers} x {args.hidden}/{args.intermediate}, 12 modules, "
        f"{len(batch)} sequences, {int(batch.attention.sum())} tokens; layers below the lowest "
        f"module are kept ({backbone.prefix.depth} of them)"
    )
    rows = [measure(case, r, p, args) for r in args.ranks for p in args.passes]
    print("milliseconds, medians; functional against plain, dense against functional")
    head = ["rank x passes", "plain", "functional", "dense", "gradient", "dense gradient",
            "functional", "dense", "dense gradient", "gap"]  # fmt: skip
    print(table(head, rows))


if __name__ == "__main__":
    main()
