"""Seconds to commit an edit: the ledger beside the naive dense path, and memory bandwidth reached.

    make bench                                    # 12 modules of 4096 x 14336, k = 6 of them
    python benchmarks/ledger_commit.py --modules 4 --chosen 2 --ranks 8,64

Each edit brings a shift for every module and a mask that chooses k of them. The ledger commits it
with ``DeltaState.commit`` (checks included): order-exact into an fp32 accumulator, and rounded into
the weights. The naive path is ``W += (B @ A).to(dtype)`` on the same k modules. Both, and a plain
``Tensor.copy_`` as the yardstick of bandwidth, are timed in alternation, so that a machine that
slows down slows all. First the run checks the ledger's result on a small module against the
reference, bit for bit; if it differs, no speed is reported.

What a commit must move per element: the accumulator read and written, W_0 read, W written (12
bytes in bf16). The last part shows what the exactness buys: how much of the sum of many small
shifts arrives.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hiedit import extension  # noqa: E402
from hiedit.backbone.modules import EditableModule  # noqa: E402
from hiedit.ledger.accumulate import accumulate_, commit_  # noqa: E402
from hiedit.ledger.state import DeltaState  # noqa: E402
from hiedit.types import Shift  # noqa: E402

GIB = 2**30


def available_memory() -> int:
    """Bytes that can be allocated without swapping."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def fitting(args) -> int:
    """How many of the modules fit into four fifths of the memory: W, W_0 and acc of each, the naive
    path's own W of the chosen ones and its temporaries, two buffers to copy between."""
    size, elements = args.torch_dtype.itemsize, args.out * args.inner
    fixed = elements * (args.chosen * size + 8 + 2 * size + 8)
    return max(int((0.8 * available_memory() - fixed) // (elements * (2 * size + 4))), 0)


def editable(name: str, weight: Tensor) -> EditableModule:
    """A linear layer around ``weight``, as a model's would be."""
    out, inner = weight.shape
    layer = nn.Linear(inner, out, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return EditableModule(name, layer, inner, out, False)


def edit(args, rank: int, seed: int) -> dict[str, Shift]:
    """One edit: a shift for every module, the mask as scales, another choice for every seed."""
    g = torch.Generator().manual_seed(seed)
    chosen = set(torch.randperm(args.modules, generator=g)[: args.chosen].tolist())
    A, B = torch.randn(rank, args.inner, generator=g), torch.randn(args.out, rank, generator=g)
    return {
        f"module {i}": Shift(A, B * 1e-6, torch.full((rank,), float(i in chosen)))
        for i in range(args.modules)
    }


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def check(dtype: torch.dtype) -> None:
    """The committed bits are those of the reference, or no speed is reported."""
    g = torch.Generator().manual_seed(1)
    W0 = torch.randn(61, 203, generator=g).to(dtype)
    A, B = torch.randn(9, 203, generator=g), torch.randn(61, 9, generator=g)
    found, expected = (
        commit_(W0.clone(), W0, torch.zeros(61, 203), A, B, backend=backend)
        for backend in (None, "reference")
    )
    if not torch.equal(found, expected):
        sys.exit("the commit's bits are not those of the reference; no speed is reported")


def measure(args, rank: int, state: DeltaState, plain: list[Tensor]) -> dict[str, list[float]]:
    """Seconds of every repeat: a commit, the naive path on as many weights, a plain copy."""
    source, target = (torch.zeros(args.out * args.inner) for _ in range(2))
    times: dict[str, list[float]] = {"ledger": [], "naive": [], "copy": []}
    for repeat in range(args.repeats + 1):
        shifts = edit(args, rank, repeat)
        first = next(iter(shifts.values()))

        def naive(A=first.A, B=first.B):
            for W in plain:
                W += (B @ A).to(W.dtype)

        works = {
            "ledger": lambda shifts=shifts: state.commit(shifts),
            "naive": naive,
            "copy": lambda: target.copy_(source),
        }
        for name, work in works.items():
            taken = seconds(work)
            if repeat > 0:  # the first one warms up
                times[name].append(taken)
        print(f"\rrank {rank}: {repeat}/{args.repeats}", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    return times


def row(args, rank: int, times: dict[str, list[float]]) -> list[str]:
    """One line of the table: medians, and in brackets the smallest and the largest."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    elements = args.out * args.inner
    needed = args.chosen * elements * (8 + 2 * args.torch_dtype.itemsize) / medians["ledger"]
    copied = elements * 8 / medians["copy"]
    flops = 2 * rank * args.chosen * elements / medians["ledger"]
    spreads = [
        f"{medians[name]:.3f} ({min(times[name]):.3f}–{max(times[name]):.3f})"
        for name in ("ledger", "naive")
    ]
    return [
        str(rank),
        *spreads,
        f"{medians['naive'] / medians['ledger']:.1f}x",
        f"{needed / 1e9:.1f}",
        f"{copied / 1e9:.1f}",
        f"{needed / copied:.0%}",
        f"{flops / 1e9:.0f}",
    ]


def lost(n: int, shifts: int) -> tuple[float, float]:
    """Relative error against fp64 of ``shifts`` accumulated shifts of relative size 5e-5 on an
    [n, n] bf16 weight: in the accumulator, and where each is added to the weight in bf16."""
    g = torch.Generator().manual_seed(4)
    W0 = torch.randn(n, n, generator=g).bfloat16()
    acc, W = torch.zeros(n, n), W0.clone()
    A, B = torch.randn(shifts, n, generator=g), torch.randn(n, shifts, generator=g) * 5e-5
    for k in range(shifts):
        a, b = A[k : k + 1], B[:, k : k + 1]
        accumulate_(acc, a, b)
        W += (b @ a).bfloat16()
    exact = B.double() @ A.double()
    errors = [(t - exact).norm() / exact.norm() for t in (acc, W.double() - W0.double())]
    return float(errors[0]), float(errors[1])


def show(title: str, head: list[str], rows: list[list[str]]) -> None:
    """One table: with rich where it is installed, in plain columns elsewhere."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        print(title)
        for line in (head, *rows):
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
        return
    table = Table(*head, title=title, title_justify="left")
    for line in rows:
        table.add_row(*line)
    console = Console()
    Console(width=max(console.width, 100)).print(table)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--modules", type=int, default=12, help="editable modules (default 12)")
    parser.add_argument("--chosen", type=int, default=6, help="modules an edit changes (default 6)")
    parser.add_argument("--out", type=int, default=4096, help="rows of a weight (default 4096)")
    parser.add_argument("--in", dest="inner", type=int, default=14336, help="columns (14336)")
    parser.add_argument("--ranks", default="8,32", help="ranks of a shift (default 8,32)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of W"
    )
    parser.add_argument("--repeats", type=int, default=9, help="timed edits per rank (default 9)")
    parser.add_argument("--threads", type=int, default=0, help="0 (default): torch's number")
    parser.add_argument("--quick", action="store_true", help="seconds: small, to see that it runs")
    args = parser.parse_args(argv)
    if args.quick:
        args.modules, args.chosen, args.out, args.inner, args.repeats = 4, 2, 256, 512, 3
    args.torch_dtype = getattr(torch, args.dtype)
    args.ranks = [int(rank) for rank in args.ranks.split(",")]
    if not 1 <= args.chosen <= args.modules or min(args.ranks) < 1 or args.repeats < 1:
        parser.error(
            f"--chosen {args.chosen} must be 1 to --modules ({args.modules}); "
            f"--ranks ({args.ranks}) and --repeats ({args.repeats}) at least 1"
        )
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Measure every rank, then the numeric part, and print both."""
    args = arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    fit = fitting(args)
    if fit < args.modules:
        if fit < args.chosen:
            sys.exit(f"{available_memory() / GIB:.1f} GiB are free: too few for {args.chosen} "
                     "modules of this size; choose a smaller --out or --in")  # fmt: skip
        print(f"memory for {fit} modules instead of {args.modules}: measured with {fit}")
        args.modules = fit
    check(args.torch_dtype)
    simd = extension.instruction_set() or "none, PyTorch reference"
    print(
        f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, extension: {simd}; "
        f"{args.modules} modules of {args.out} x {args.inner} {args.dtype}, k = {args.chosen}"
    )
    start = torch.randn(args.out, args.inner).to(args.torch_dtype)
    modules = {f"module {i}": editable(f"module {i}", start.clone()) for i in range(args.modules)}
    state = DeltaState(modules)
    # Every module's accumulator and base are made before the clock starts.
    all_ones = {name: Shift(s.A, s.B) for name, s in edit(args, 1, 0).items()}
    state.commit(all_ones)
    plain = [start.clone() for _ in range(args.chosen)]
    rows = [row(args, rank, measure(args, rank, state, plain)) for rank in args.ranks]
    head = ["rank", "ledger, s", "naive, s", "ratio", "GB/s", "copy_ GB/s", "share", "GFLOPS"]
    show("seconds per edit: median (smallest–largest)", head, rows)
    n, shifts = (256, 400) if args.quick else (1024, 400)
    error, naive = lost(n, shifts)
    print(
        f"{shifts} shifts of relative size 5e-5 on a {n} x {n} bf16 weight, relative error of "
        f"their sum: accumulator {error:.1e}, naive bf16 {naive:.2f}"
    )


if __name__ == "__main__":
    main()
