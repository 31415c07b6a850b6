"""Seconds per edit, nothing being trained: ours beside the straightforward way, in one run.

    python benchmarks/edit_step.py                    # hidden 256, intermediate 688, 12 layers
    python benchmarks/edit_step.py --batch 10         # ten edits at once
    python benchmarks/edit_step.py --hidden 4096 --intermediate 14336 --layers 32 --heads 32 \\
        --kv-heads 8 --vocab 128256 --dtype bfloat16 --device cuda      # Llama-3-8B's shape

An edit is: encode, capture, choose, shift, commit. Rows of the table:

outer, lstsq   the published compositions (gate, k = 6 of 12 modules, hypernetwork, one pass);
protected      the protected closed form: 12 modules, several passes until the answer holds.

"straightforward" takes one sequence at a time, keys and gradients from hooks, dense gradients of
the edited weights by loss.backward(), dense shifts added in the model's dtype; "as released" also
computes the gradients of all parameters and sends the signals through the disk, as the released
code does. Before the clock starts both compute the shifts of the same edits from the same running
statistics, and ours is compared with what it commits: where they disagree, no speed is reported.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models import TokenisedEdit, mlp_inputs, random_edits, random_llama  # noqa: E402
from benchmarks.published_edit import DenseProtected, PublishedEditor  # noqa: E402
from benchmarks.timing import alternate, machine, medians, options, prepared, table  # noqa: E402
from benchmarks.train_step import as_request, word_tokenizer  # noqa: E402
from hiedit.backbone.model import Backbone  # noqa: E402
from hiedit.catalogue import load_method  # noqa: E402
from hiedit.config import MethodConfig, PassesConfig, UpdaterConfig  # noqa: E402
from hiedit.methods import build_method  # noqa: E402
from hiedit.types import EditBatch  # noqa: E402

WARMUP = 2  # steps before the clock
KINDS = {"outer": ("outer", "all", 2), "lstsq": ("least_squares", "answer", 4)}
Edits = Sequence[TokenisedEdit]


def method_of(row: str, rank: int) -> MethodConfig:
    """Ours with the published settings, signals not clamped; ``protected``: protected least squares
    at the answer's tokens, which is what ``published_edit.py`` writes out."""
    if row == "protected":
        plain = UpdaterConfig(tokens="answer", eta=0.1)
        return MethodConfig(updater=plain, passes=PassesConfig(max=10, target_probability=0.8))
    solver, tokens, blocks = KINDS[row]
    paper = load_method("hiedit-paper")
    updater = replace(
        paper.updater,
        solver=solver,
        tokens=tokens,
        rank=rank,
        blocks=blocks,
        eta=1e-6,
        clamp=None,
        step="gradient",
    )
    return replace(paper, updater=updater)


def batch_of(edits: Edits) -> EditBatch:
    return EditBatch(tuple(as_request(edit).unaided() for edit in edits))


def relative(mine: Tensor, theirs: Tensor) -> float:
    return float((mine - theirs).abs().max() / theirs.abs().max())


def published_gap(rollout, theirs: PublishedEditor, edits: Edits) -> float:
    """Largest relative difference of any module's shift, the statistics being theirs."""
    backbone, updater = rollout.env.backbone, rollout.updater
    theirs.capture(edits)
    theirs._predict()
    probe = rollout.env.probe(rollout._encode(batch_of(edits)), len(edits), updater.config.tokens)
    signals = probe.signals()
    for group in updater.groups:  # one of theirs for all modules of a shape, ours has one for each
        norm = theirs.nets[str(backbone.modules[group.names[0]].shape)].norm
        split = group.key_norm.mean.shape[-1]
        for ours, part in ((group.key_norm, slice(split)), (group.grad_norm, slice(split, None))):
            ours.mean.copy_(norm.mean[part].expand_as(ours.mean))
            ours.m2.copy_(norm.square[part].expand_as(ours.m2))
            ours.count.copy_(norm.count)
    with torch.no_grad():
        shifts = updater(signals, torch.ones(len(edits), len(updater.names)).to(backbone.device))
    return max(relative(shifts[name].dense(), theirs.shifts[name]) for name in updater.names)


def protected_gap(rollout, theirs: DenseProtected, edits: Edits) -> float:
    """The same for the protected closed form, after one edit has joined the protected keys."""
    first, second = edits[0], edits[1]
    rollout.step(batch_of([first]))
    theirs.edit(first)
    probe = rollout.env.probe(rollout._encode(batch_of([second])), 1, rollout.updater.config.tokens)
    mask = torch.ones(1, len(rollout.updater.names)).to(rollout.env.backbone.device)
    with torch.no_grad():
        shifts = rollout.updater(probe.signals(), mask)
    loss, _, signals = theirs._forward(second)
    loss.backward()
    return max(relative(shifts[n].dense(), theirs.shift(n, *signals[n])) for n in shifts)


def commit_gap(rollout, edits: Edits) -> float:
    """Largest relative difference of the weights committed from those that the shift says."""
    before = {n: m.weight.detach().clone() for n, m in rollout.env.backbone.modules.items()}
    outcome = rollout.step(batch_of(edits))
    now = rollout.env.backbone.modules
    return max(
        relative(now[n].weight, (before[n].float() + s.dense()).to(before[n].dtype))
        for n, s in outcome.shifts.items()
    )


def measure(row: str, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds per edit of all, and the passes that ours and theirs took."""
    dtype = getattr(torch, args.dtype)
    model = random_llama(
        args.hidden, args.intermediate, args.layers, args.heads, args.vocab, dtype, args.kv_heads,
        args.device,
    )  # fmt: skip
    modules = mlp_inputs(range(args.layers // 3, args.layers // 3 + 6))
    rounds = WARMUP + args.edits
    edits = [e.to(args.device) for e in random_edits((rounds + 8) * args.batch, args.vocab)]
    batches = [edits[i : i + args.batch] for i in range(0, len(edits), args.batch)]
    backbone = Backbone(copy.deepcopy(model), word_tokenizer(args.vocab), modules)
    preserve = [(r.prompt, r.target) for r in map(as_request, random_edits(64, args.vocab, 1))]
    method = build_method(backbone, method_of(row, args.rank), (), preserve)
    rollout = method.rollout
    if row == "protected":
        moments = {}
        for group in rollout.updater.groups:
            p = group.protection
            moments |= dict(
                zip(group.names, zip(p.moment, p.unit, p.power, strict=True), strict=True)
            )
        theirs = DenseProtected(model, moments, method.config)
        gap = protected_gap(rollout, theirs, batches[-1] + batches[-2])
        runs = {"straightforward": lambda n: [theirs.edit(edit) for edit in batches[n]]}
    else:
        settings = dict(solver=row, rank=args.rank, blocks=KINDS[row][2])
        released = PublishedEditor(copy.deepcopy(model), modules, as_released=True, **settings)
        theirs = PublishedEditor(model, modules, **settings)
        for batch in batches[-8:-1]:  # running statistics of a few dozen tokens at least
            theirs.capture(batch)
        gap = published_gap(rollout, theirs, batches[-1])
        runs = {
            "released": lambda n: released.edit(batches[n]),
            "straightforward": lambda n: theirs.edit(batches[n]),
        }
    gap = max(gap, commit_gap(rollout, batches[-2]))
    if not gap < (2e-3 if dtype == torch.float32 else 1e-1):
        sys.exit(f"{row}: the two disagree by {gap:.1e}; no speed is reported")
    passes = {"ours": 0, "theirs": 0}

    def ours(n):
        passes["ours"] += rollout.step(batch_of(batches[n])).passes
        passes["theirs"] += getattr(theirs, "passes", 1)

    taken = medians(alternate(runs | {"ours": ours}, args.edits, args.device, WARMUP, args.clock))
    per_edit = {name: value / args.batch for name, value in taken.items()}
    return per_edit | {"gap": gap, "passes": passes["ours"] / rounds}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options(__doc__, "hidden 64, intermediate 176, 8 layers, 4 edits")
    sizes = (("hidden", 256), ("intermediate", 688), ("layers", 12), ("heads", 4), ("vocab", 3000))
    for name, value in sizes:
        parser.add_argument(f"--{name}", type=int, default=value, help=f"of the model ({value})")
    parser.add_argument("--kv-heads", type=int, help="of the model (as many as --heads)")
    parser.add_argument("--rank", type=int, default=64, help="of the hypernetwork (64)")
    parser.add_argument("--batch", type=int, default=1, help="edits in one step (1)")
    parser.add_argument("--edits", type=int, default=40, help="timed steps (40)")
    rows = (*KINDS, "protected")
    parser.add_argument("--rows", default=",".join(rows), help=f"of the table ({','.join(rows)})")
    args = prepared(parser, argv)
    if args.quick:
        args.hidden, args.intermediate, args.layers, args.vocab, args.edits = 64, 176, 8, 500, 4
    args.rows = args.rows.split(",")
    if args.layers < 8 or set(args.rows) - set(rows) or min(args.batch, args.edits) < 1:
        parser.error(
            f"--layers {args.layers} must be at least 8, --batch and --edits at least 1, --rows "
            f"({','.join(args.rows)}) among {', '.join(rows)}"
        )
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every row and print one table."""
    args = arguments(argv)
    print(
        f"{machine(args)}, Llama {args.layers} x {args.hidden}/{args.intermediate}, 12 modules, "
        f"{args.batch} edit(s) a step, medians of {args.edits} steps in alternation"
    )
    rows = []
    for name in args.rows:
        row = measure(name, args)
        released = row.get("released")
        ratio = [v and f"{v / row['ours']:.1f}x" for v in (released, row["straightforward"])]
        cells = (released, row["straightforward"], row["ours"])
        rows.append(
            [name, *(f"{1e3 * v:.2f}" if v else "-" for v in cells), *(r or "-" for r in ratio),
             f"{row['passes']:.1f}", f"{row['gap']:.0e}"]
        )  # fmt: skip
    print("milliseconds per edit; ratios to ours; gap: largest relative difference of the shifts")
    head = ["", "as released", "straightforward", "ours", "ratio", "ratio", "passes", "gap"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
