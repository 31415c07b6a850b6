"""What the benchmarks share: a clock, timing in alternation, one table, one line on the machine."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch


def options(doc: str, quick: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes; ``doc`` is its module's docstring, shown whole.

    quick: what ``--quick`` measures instead.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=formatter)
    parser.add_argument(
        "--quick", action="store_true", help=f"seconds, to see that it runs: {quick}"
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"cpu or cuda (default here: {default})")
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--dtype", default="float32", choices=dtypes, help="of the model's weights")
    parser.add_argument(
        "--clock", default="wall", choices=("wall", "cpu"), help="cpu: time that the processor "
        "spent on it, steadier than wall time where other processes run (CPU alone)"
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=0, help="0 (default): torch's own number")
    return parser


def prepared(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options in ``argv`` (None: of the command line); sets the number of threads."""
    args = parser.parse_args(argv)
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: this torch sees no GPU; use --device cpu")
    if args.clock == "cpu" and args.device != "cpu":
        parser.error(f"--clock cpu: a GPU's time is not the processor's; --device {args.device}")
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def machine(args: argparse.Namespace) -> str:
    """The device, the threads and the versions that a figure belongs to."""
    name = "CPU" if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    threads = f"{torch.get_num_threads()} threads, {args.clock} time"
    return f"{name}, {threads}, torch {torch.__version__}, {args.dtype}"


def seconds(run: Callable[[], object], device: str, clock: str = "wall") -> float:
    """How long ``run`` takes, on a GPU until its last kernel is done."""
    wait = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    now = time.perf_counter if clock == "wall" else time.process_time
    wait()
    begin = now()
    run()
    wait()
    return now() - begin


def alternate(
    runs: Mapping[str, Callable[[int], object]],
    repeats: int,
    device: str,
    warmup: int = 1,
    clock: str = "wall",
) -> dict[str, list[float]]:
    """Seconds of every run, ``repeats`` of each, in alternation: a machine that slows down slows
    all. Each is given the number of its round; the order is turned around at every other round,
    so that none always comes after the same neighbour. The first ``warmup`` rounds do not count.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warmup + repeats):
        order = list(runs.items())
        for name, run in order if number % 2 == 0 else reversed(order):
            value = seconds(lambda run=run, number=number: run(number), device, clock)
            if number >= warmup:
                taken[name].append(value)
    return taken


def medians(taken: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in taken.items()}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain columns; the first one left-aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)])

    return "\n".join([line(head), *map(line, rows)])
