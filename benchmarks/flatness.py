"""Whether an edit costs the same after thousands of others: seconds at edit 2,000 over edit 100.

    python benchmarks/flatness.py                     # 2,000 edits in memory, 600 with a ledger
    python benchmarks/flatness.py --edits 200 --ledger-edits 150

Two editors of the same small model (random weights) are brought to edit 100 and to the last edit;
then both get the same new requests in alternation, so that a machine that slows down slows both.
Methods: protected least squares and UltraEdit; with a fixed number of passes, as an edit that
needs more of them would hide what history costs. In memory it is the rollout on its own, with a
ledger ``hiedit.Editor.edit``: conflicts looked up, effect predicted, factors on disk, then commit.

At the end the weights of the larger one are compared with the sum of all its shifts (in memory)
or with what its ledger rebuilds on a fresh model: where they differ, no figure is reported.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models import mlp_inputs, random_edits, random_llama  # noqa: E402
from benchmarks.timing import alternate, machine, options, prepared, seconds, table  # noqa: E402
from benchmarks.train_step import as_request, word_tokenizer  # noqa: E402
from hiedit.backbone.model import Backbone  # noqa: E402
from hiedit.catalogue import load_method  # noqa: E402
from hiedit.config import MethodConfig, PassesConfig  # noqa: E402
from hiedit.editor import Editor  # noqa: E402
from hiedit.ledger.state import DeltaState  # noqa: E402
from hiedit.methods import build_method  # noqa: E402
from hiedit.types import EditBatch, EditRequest, Shifts  # noqa: E402

VOCAB, LAYERS, PASSES = 500, 8, 2
METHODS = ("closed-form", "ultraedit")
Edit = Callable[[EditRequest], object]


@dataclass(frozen=True)
class Flatness:
    """Medians in seconds per edit; windows: (edits so far, median of that window)."""

    early: float
    late: float
    windows: tuple[tuple[int, float], ...]

    @property
    def ratio(self) -> float:
        return self.late / self.early


def fixed(method: str) -> MethodConfig:
    """The method with as many passes for every edit as for any other, small steps."""
    config = load_method(method)
    passes = PassesConfig(PASSES if config.passes.max > 1 else 1, 1.0, False)
    return replace(config, passes=passes, updater=replace(config.updater, eta=1e-3))


def parts(args: argparse.Namespace, method: str):
    """A fresh model of random weights, always the same, and the method on it."""
    dtype = getattr(torch, args.dtype)
    model = random_llama(args.hidden, args.intermediate, LAYERS, 4, VOCAB, dtype, None, args.device)
    backbone = Backbone(model, word_tokenizer(VOCAB), mlp_inputs(range(2, 8)))
    preserve = [(r.prompt, r.target) for r in islice(requests(7), 64)]
    return build_method(backbone, fixed(method), (), preserve), preserve


def requests(seed: int = 0) -> Iterator[EditRequest]:
    """Requests without end; prompts and answers of one length each, so that all cost the same."""
    while True:
        for edit in random_edits(500, VOCAB, seed, (16, 16), (2, 2)):
            request = as_request(edit)
            yield EditRequest(request.prompt, request.target)
        seed += 1000


def compare(small: Edit, large: Edit, edits: int, args: argparse.Namespace) -> Flatness:
    """Brings ``large`` to ``edits``, ``small`` to the early one, then times both in alternation."""
    source = requests()
    taken = [seconds(partial(large, r), args.device, args.clock) for r in islice(source, edits)]
    for request in islice(source, args.early):
        small(request)
    both = list(islice(source, args.pairs + 5))
    rounds = {"early": lambda n: small(both[n]), "late": lambda n: large(both[n])}
    times = alternate(rounds, args.pairs, args.device, warmup=5, clock=args.clock)
    width = max(edits // 5, 1)
    windows = tuple((at + width, statistics.median(taken[at : at + width]))
                    for at in range(0, edits - width + 1, width))  # fmt: skip
    return Flatness(*map(statistics.median, (times["early"], times["late"])), windows)


def in_memory(method: str, args: argparse.Namespace) -> Flatness:
    small, large = (parts(args, method)[0].rollout for _ in range(2))
    done: list[Shifts] = []

    def edit_large(request: EditRequest) -> None:
        done.append(large.step(EditBatch((request,))).shifts)

    def edit_small(request: EditRequest) -> None:
        small.step(EditBatch((request,)))

    flat = compare(edit_small, edit_large, args.edits, args)
    fresh = DeltaState(parts(args, method)[0].rollout.env.backbone.modules)
    fresh.rebuild(list(fresh.modules), done)
    _same(f"{method}, in memory", large.env.backbone.modules, fresh.modules)
    return flat


def with_ledger(method: str, args: argparse.Namespace, folder: Path) -> Flatness:
    def editor(name: str) -> Editor:
        return Editor(*_ordered(parts(args, method), folder / name))

    with editor("small") as small, editor("large") as large:
        edits = args.ledger_edits
        flat = compare(lambda r: small.edit([r]), lambda r: large.edit([r]), edits, args)
        modules = large._env.backbone.modules
    with editor("large") as again:
        _same(f"{method}, with a ledger", modules, again._env.backbone.modules)
    return flat


def _ordered(made, directory: Path):
    method, preserve = made
    return method, directory, None, preserve


def _same(what: str, mine, rebuilt) -> None:
    """Both have the same bits, and something was edited at all."""
    for name, module in mine.items():
        if not torch.equal(module.weight, rebuilt[name].weight):
            sys.exit(f"{what}: {name} is not the sum of its edits; no figure is reported")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options(__doc__, "hidden 32, edit 12 and, with a ledger, 8 over edit 3")
    for name, value in (("hidden", 64), ("intermediate", 176), ("early", 100),
                        ("edits", 2000), ("pairs", 200)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help=f"({value})")
    parser.add_argument(
        "--ledger-edits", type=int, default=600, help="the same with a ledger (600)"
    )
    parser.add_argument("--methods", default=",".join(METHODS), help=f"({','.join(METHODS)})")
    args = prepared(parser, argv)
    if args.quick:
        args.hidden, args.intermediate = 32, 80
        args.early, args.edits, args.ledger_edits, args.pairs = 3, 12, 8, 3
    args.methods = args.methods.split(",")
    if min(args.edits, args.ledger_edits) <= args.early or args.pairs < 1:
        parser.error(
            f"--edits {args.edits} and --ledger-edits {args.ledger_edits} must exceed --early "
            f"{args.early}, and --pairs {args.pairs} be positive"
        )
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both methods in memory and with a ledger, and print one table."""
    args = arguments(argv)
    print(
        f"{machine(args)}, Llama {LAYERS} x {args.hidden}/{args.intermediate}, 12 modules, "
        f"{args.pairs} pairs in alternation"
    )
    measured: list[tuple[str, int, Flatness]] = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # an edit that was rejected costs less
        for method in args.methods:
            measured.append((f"{method}, in memory", args.edits, in_memory(method, args)))
            flat = with_ledger(method, args, Path(folder) / method)
            measured.append((f"{method}, ledger", args.ledger_edits, flat))
    print("median milliseconds per edit in windows of the stream, not in alternation:")
    for name, _, flat in measured:
        print(f"{name}, by edit: " + "  ".join(f"{n}: {1e3 * t:.2f}" for n, t in flat.windows))
    rows = [
        [name, f"{1e3 * f.early:.3f}", f"{1e3 * f.late:.3f}", str(edits), f"{f.ratio:.3f}"]
        for name, edits, f in measured
    ]
    head = ["milliseconds per edit", f"at edit {args.early}", "at the last", "which is", "ratio"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
