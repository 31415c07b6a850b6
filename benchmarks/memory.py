"""Peak memory of training steps beside that of the frozen model, and what it is made of.

    python benchmarks/memory.py                       # hidden 1024, intermediate 4096, 12 layers
    python benchmarks/memory.py --solver outer --rank 1024
    python benchmarks/memory.py --at-once 4           # the reward in parts of four sequences

A process of its own builds the model, notes what it holds, trains on some edits at full
``back_depth`` and notes the most it ever held. On the CPU that is the resident memory (VmHWM of
/proc/self/status, set back before the steps), on a GPU what PyTorch allocated. A step on a tiny
model comes first, so that libraries and thread pools count for neither. The memory of each part
follows from its shape
(``step_bytes``): the table shows it beside what was measured, and the same formula for Llama-3-8B
and 70B in bf16 with the published ranks. Where the two differ by more than a fifth, nothing is
extrapolated. Two parts stay from step to step and one goes with the step:

learner        hypernetwork and policy, their gradients and Adam's two moments (fp32);
ledger         of every editable module a copy of W_0 and the sum of its shifts (fp32); with
               ``model.edits_on=host`` these are in the host's memory and not on the GPU, which
               the column "edits on host" leaves out (on a CPU the two are one memory);
step           activations above the lowest editable module, factors, logits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.models import mlp_inputs, random_edits, random_llama  # noqa: E402
from benchmarks.timing import machine, options, prepared, table  # noqa: E402
from benchmarks.train_step import DEPTH, Ours, as_request, word_tokenizer  # noqa: E402
from hiedit import extension  # noqa: E402
from hiedit.plan.shapes import Shape, model_bytes, step_bytes  # noqa: E402
from hiedit.types import EditBatch, Shift  # noqa: E402

MIB = 1 << 20
SOLVERS = {"outer": ("outer", 2), "lstsq": ("least_squares", 4)}
TOLERANCE = 0.2
SEEN = ("tokens", "answers", "edit_tokens", "part")


LLAMA_8B = Shape(4096, 14336, 32, 128256, 11, 32, 8, bytes=2, rank=1920, fused=False)
LLAMA_70B = replace(LLAMA_8B, hidden=8192, intermediate=28672, layers=80, heads=64, first=30)


def resident(peak: bool) -> int:
    """Bytes this process holds, or has held at most since ``forget_peak``."""
    key = "VmHWM:" if peak else "VmRSS:"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}: memory on the CPU is read on Linux only")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def train(args: argparse.Namespace, shape: Shape, edits: int) -> tuple[int, int, Shape]:
    """(bytes with the model alone, most bytes while training, the shape with the tokens seen)."""
    dtype = getattr(torch, args.dtype)
    model = random_llama(shape.hidden, shape.intermediate, shape.layers, shape.heads, shape.vocab,
                         dtype, shape.kv_heads, args.device)  # fmt: skip
    model.requires_grad_(False)
    stream = random_edits(DEPTH - 1 + edits, shape.vocab)
    gpu = args.device != "cpu"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        forget_peak()
        before = resident(peak=False)
    first = shape.first
    ours = Ours(model, word_tokenizer(shape.vocab), mlp_inputs(range(first, first + 6)),
                args.solver, shape.rank, args.at_once)  # fmt: skip
    # Untouched memory is not resident: every module has been edited before the peak is read.
    ours.trainer.rollout.env.state.commit(_touch_all(ours.backbone.modules))
    for edit in stream[:-edits]:  # part of the reward from the first step on
        ours.trainer.objective.remember(EditBatch((as_request(edit),)))
    for edit in stream[-edits:]:
        ours.train_edit(edit)
    after = torch.cuda.max_memory_allocated() if gpu else resident(peak=True)
    rows = stream[-DEPTH:]
    tokens = sum(e.paraphrase[0].numel() + e.locality[0].numel() for e in rows)
    answers = sum(int((e[1] >= 0).sum()) for r in rows for e in (r.paraphrase, r.locality))
    labels = rows[-1].edit[1][0]
    answer = int((labels >= 0).sum())
    last = labels.numel() - 1 if args.solver == "outer" else answer
    part = min(1.0, args.at_once / (2 * DEPTH)) if args.at_once else 1.0
    return (
        before,
        after,
        replace(shape, tokens=tokens, answers=answers, edit_tokens=last, part=part),
    )


def _touch_all(modules) -> dict[str, Shift]:
    """A shift of zeros for every module."""
    zeros = {n: (m.weight.new_zeros(1, m.in_features), m.weight.new_zeros(m.out_features, 1))
             for n, m in modules.items()}  # fmt: skip
    return {n: Shift(a.float(), b.float()) for n, (a, b) in zeros.items()}


def inside(args: argparse.Namespace) -> None:
    """In the process that is measured: the tiny steps, then the real ones; prints JSON."""
    shape = shape_of(args)
    train(args, replace(shape, hidden=64, intermediate=128, vocab=300, rank=8), 1)
    before, after, seen = train(args, shape, args.edits)
    counts = {k: getattr(seen, k) for k in SEEN}
    print(json.dumps({"before": before, "after": after, **counts}))


def shape_of(args: argparse.Namespace) -> Shape:
    kv = args.kv_heads or args.heads
    size = torch.finfo(getattr(torch, args.dtype)).bits // 8
    compiled = os.environ.get("HIEDIT_BACKEND") != "reference" and extension.load().available
    fused = compiled and args.device == "cpu" and size == 4
    return Shape(
        args.hidden, args.intermediate, args.layers, args.vocab, args.layers // 3, args.heads, kv,
        bytes=size, rank=args.rank, blocks=SOLVERS[args.solver][1],
        fused=fused,
    )  # fmt: skip


def measure(args: argparse.Namespace) -> tuple[int, Shape]:
    """(bytes that training needed beside the model, the shape with the tokens it saw)."""
    names = ("hidden", "intermediate", "layers", "vocab", "heads", "rank", "edits", "solver",
             "device", "dtype", "threads", "at_once")  # fmt: skip
    command = [sys.executable, __file__, "--inside"]
    command += [p for n in names for p in (f"--{n.replace('_', '-')}", str(getattr(args, n)))]
    command += ["--kv-heads", str(args.kv_heads)] if args.kv_heads else []
    # What is freed goes back to the system at once, so that the peak is of what was in use.
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        sys.exit(f"the process that is measured failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    seen = {k: found[k] for k in SEEN}
    return found["after"] - found["before"], replace(shape_of(args), **seen)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options(__doc__, "hidden 512, intermediate 1536, 8 layers")
    sizes = (("hidden", 1024), ("intermediate", 4096), ("layers", 12), ("heads", 4),
             ("vocab", 3000), ("rank", 64), ("edits", 3))  # fmt: skip
    for name, value in sizes:
        parser.add_argument(f"--{name}", type=int, default=value, help=f"({value})")
    parser.add_argument("--kv-heads", type=int, help="of the model (as many as --heads)")
    parser.add_argument("--at-once", type=int, default=0, help="of the reward's sequences (0: all)")
    parser.add_argument("--solver", default="lstsq", choices=tuple(SOLVERS), help="(lstsq)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = prepared(parser, argv)
    if args.quick:
        args.hidden, args.intermediate, args.layers, args.edits = 512, 1536, 8, 1
    if args.layers < 8 or args.edits < 1:
        parser.error(f"--layers {args.layers} must be at least 8, --edits {args.edits} at least 1")
    return args


def lines(name: str, shape: Shape, measured: int | None) -> list[str]:
    """One row of the table, MiB and percent of the model."""
    parts, model = step_bytes(shape), model_bytes(shape)
    step = sum(parts[k] for k in ("activations", "factors", "logits"))
    total = sum(parts.values())

    def percent(value: int) -> str:
        return f"{value / MIB:,.0f} ({value / model:.0%})"

    return [name, f"{model / MIB:,.0f}", percent(parts["learner"]), percent(parts["ledger"]),
            percent(step), percent(total), percent(total - parts["ledger"]),
            percent(measured) if measured else "-"]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, compare with the formula, print one table."""
    args = arguments(argv)
    if args.inside:
        return inside(args)
    measured, shape = measure(args)
    formula = sum(step_bytes(shape).values())
    print(
        f"{machine(args)}, {args.solver}, rank {shape.rank}, 12 modules, {shape.tokens} tokens of "
        f"reward, training edits: {args.edits}; formula over measured: {formula / measured:.2f}"
    )
    if abs(formula / measured - 1) > TOLERANCE:
        sys.exit(
            f"the formula says {formula / MIB:,.0f} MiB and {measured / MIB:,.0f} were measured; "
            "nothing is extrapolated"
        )
    rows = [lines(f"{args.hidden}/{args.intermediate}", shape, measured)]
    blocks, part = shape.blocks, shape.part
    rank = 1920 if args.solver == "outer" else 1024
    for name, big in (("Llama-3-8B", LLAMA_8B), ("Llama-3-70B", LLAMA_70B)):
        rows.append(lines(name, replace(big, rank=rank, blocks=blocks, part=part), None))
    print("MiB (and percent of the model); the rows without a measurement are the formula alone")
    print(
        table(
            ["", "model", "learner", "ledger", "step", "together", "edits on host", "measured"],
            rows,
        )
    )


if __name__ == "__main__":
    main()
