"""What the guard's bounds let through: single edits of records on a real model, one after another,
with every method, without bounds and with them.

    python -m benchmarks.guard --model DIR --records train.json --edits 30

The records after those of the stream are what a method that protects is fitted on.

KL, drift: of the guard's watched tokens, nats per token. taught: share of the edits whose answer is
the most likely one token by token after the whole stream. kept: share of the unrelated prompts'
first greedy tokens that are still those of the unedited model. watch s: processor seconds a
measurement.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hiedit.backbone.losses import answer_hits, mean_by_row
from hiedit.backbone.model import Backbone
from hiedit.catalogue import load_method
from hiedit.data.records import load_records
from hiedit.data.tokens import encode
from hiedit.experiment import load_backbone
from hiedit.guard import Guard, GuardedRollout
from hiedit.methods import build_method
from hiedit.runconfig import ModelConfig
from hiedit.types import EditBatch, EditRequest
from hiedit.watch import Moved, Watch

METHODS = ("closed-form", "ultraedit", "ft")
FREE = Guard(max_kl=1e9, max_drift=1e9)  # measured all the same


class Seen(Watch):
    """A watch that keeps what it measured."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.found: list[Moved] = []
        self.seconds: list[float] = []

    def measure(self) -> Moved:
        start = time.process_time()
        moved = super().measure()
        self.seconds.append(time.process_time() - start)
        self.found.append(moved)
        return moved


@dataclass(frozen=True)
class Row:
    method: str
    bounds: str
    rejected: int
    halved: int
    kl: list[float]
    drift: float
    changed: float
    taught: float
    kept: float
    watch: float = 0.0


def first_tokens(backbone: Backbone, prompts: Sequence[str]) -> torch.Tensor:
    """int64 [N]: what the model as it is says first."""
    tokens = encode(backbone.tokenizer, [(p, ".") for p in prompts], padding_side="left")
    with torch.no_grad():
        answers = backbone.answers(tokens.to(backbone.device))
    first = torch.ones_like(answers.row, dtype=torch.bool)
    first[1:] = answers.row[1:] != answers.row[:-1]
    return answers.logits[first].argmax(-1)


def taught(backbone: Backbone, requests: Sequence[EditRequest]) -> float:
    pairs = [(r.prompt, r.target) for r in requests]
    with torch.no_grad():
        answers = backbone.answers(encode(backbone.tokenizer, pairs, padding_side="left"))
    return float((mean_by_row(answer_hits(answers).float(), answers) == 1).float().mean())


def measure(backbone, name: str, requests, others, guard: Guard, places, before) -> Row:
    """One stream from the unedited model on; the model comes back unedited."""
    torch.manual_seed(0)
    method = build_method(backbone, load_method(name), others, (), 0)
    rollout = GuardedRollout(method.rollout, guard)
    rollout.watch = watch = Seen(rollout.env)
    rollout.reset()
    kls: list[float] = []
    for i, request in enumerate(requests):
        count = len(watch.found)
        rollout.step(EditBatch((request,), i))
        if len(watch.found) > count:
            kls.append(watch.found[count].kl)  # at its full size
        if (i + 1) % 10 == 0:
            now = float((first_tokens(backbone, places) == before).float().mean())
            print(
                f"  {name} after {i + 1}: drift {rollout.drift:.3f}, kept {now:.2f}, rejected "
                f"{rollout.rejected}, halved {rollout.halved}",
                file=sys.stderr,
                flush=True,
            )
    moved = watch.measure()
    kept = float((first_tokens(backbone, places) == before).float().mean())
    bounds = "none" if guard == FREE else f"{guard.max_kl:g}, {guard.max_drift:g}"
    row = Row(
        name, bounds, rollout.rejected, rollout.halved, kls, moved.drift, moved.changed,
        taught(backbone, requests), kept, statistics.median(watch.seconds[1:]),
    )  # fmt: skip
    rollout.reset()
    return row


def show(row: Row) -> None:
    kl = sorted(row.kl) or [float("nan")]
    at = [kl[int(q * (len(kl) - 1))] for q in (0.5, 0.9, 1)]
    print(
        f"{Path(row.method).stem:<14}{row.bounds:<12}{row.rejected:>9}{row.halved:>8}  "
        + "".join(f"{v:>10.4f}" for v in at)
        + f"{row.drift:>9.3f}{row.changed:>9.2f}{row.taught:>8.2f}{row.kept:>7.2f}"
        f"{row.watch:>9.2f}",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--records", required=True)
    parser.add_argument("--edits", type=int, default=30)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--modules", nargs="*", help="default: those of the model's configuration")
    parser.add_argument(
        "--bounds", nargs=2, type=float, default=(Guard().max_kl, Guard().max_drift)
    )
    parser.add_argument("--only", choices=("free", "bound"))
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    model = ModelConfig("model", given.model, given.modules, "float32", "cpu")
    backbone = load_backbone(model)
    requests = load_records(given.records).requests
    requests, others = requests[: given.edits], requests[given.edits : given.edits + 400]
    places = [place.prompt for r in requests for place in r.locality]
    before = first_tokens(backbone, places)
    print(f"{'method':<14}{'bounds':<12}{'rejected':>9}{'halved':>8}  {'KL median':>10}"
          f"{'90%':>10}{'most':>10}{'drift':>9}{'changed':>9}{'taught':>8}{'kept':>7}"
          f"{'watch s':>9}")  # fmt: skip
    guards = {"free": FREE, "bound": Guard(max_kl=given.bounds[0], max_drift=given.bounds[1])}
    for name in given.methods:
        for kind, guard in guards.items():
            if given.only in (None, kind):
                show(measure(backbone, name, requests, others, guard, places, before))


if __name__ == "__main__":
    main()
