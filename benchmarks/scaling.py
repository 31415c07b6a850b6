"""Training edits per second on Ray with one worker and with two, and what 64 workers would do.

    python benchmarks/scaling.py                           # embedded world, one thread per worker
    python benchmarks/scaling.py --rows 1,10,10/bfloat16,1/async --edits 40 --rounds 5

A row is edits per update, and what follows a slash. Two workers run two trajectories; one worker
runs the same two one after the other, so that both do the same edits. Loading is left out: all
processes are there before the clock starts. Runs alternate, medians are told. First one worker must
have the bits of training in this process, or no speed is reported.

Wall seconds need two idle cores to mean anything. The CPU seconds per edit are told beside them: if
two workers need no more of them than one, then a slow pair is due to others on the machine.

The second table is the model in benchmarks/scaling_model.py with what was measured here and with
what was not, which is said.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.scaling_model import WORKERS, Inputs, rows  # noqa: E402
from benchmarks.timing import machine, options, prepared, table  # noqa: E402
from hiedit.catalogue import load_method  # noqa: E402
from hiedit.config import TrainConfig  # noqa: E402
from hiedit.distributed import require_ray  # noqa: E402
from hiedit.distributed.session import session  # noqa: E402
from hiedit.distributed.trainer import RayTrainer  # noqa: E402
from hiedit.distributed.worker import RolloutWorker  # noqa: E402
from hiedit.experiment import load_backbone, load_data  # noqa: E402
from hiedit.methods import build_method  # noqa: E402
from hiedit.rl.objective import Objective  # noqa: E402
from hiedit.rl.observed import learned_state  # noqa: E402
from hiedit.rl.segment import Trajectory  # noqa: E402
from hiedit.runconfig import (  # noqa: E402
    DatasetConfig,
    DistributionConfig,
    ModelConfig,
    StreamConfig,
)

SEED = 0


class Renewed(RolloutWorker):
    """A worker that can begin anew, as another one and with other settings."""

    def renew(self, setup) -> None:
        rollout = self.trajectory.rollout
        objective = Objective(setup.method.objective, rollout.env.backbone.tokenizer, setup.seed)
        requests = self.trajectory._source[0]
        rollout.reset()
        rollout.env.backbone.prefix.cache.clear()
        self.setup = setup
        self.trajectory = Trajectory(rollout, objective, requests, setup.train, setup.seed)


@dataclasses.dataclass(frozen=True)
class Row:
    """What is measured: edits per update, how gradients travel, who waits."""

    steps: int
    dtype: str = "float32"
    mode: str = "sync"

    @classmethod
    def parse(cls, text: str) -> Row:
        steps, *rest = text.split("/")
        row = cls(int(steps))
        for word in rest:
            key = {"bfloat16": "dtype", "async": "mode"}.get(word)
            if key is None:
                raise ValueError(f"--rows {text}: {word!r} is neither bfloat16 nor async")
            row = dataclasses.replace(row, **{key: word})
        return row


class Crew:
    """``count`` workers and a learner, loaded once; ``run`` has them train from the beginning."""

    def __init__(self, method, model, requests, count: int):
        import ray

        from hiedit.distributed.learner import LearnerActor
        from hiedit.distributed.pool import WorkerPool

        self.count, self.ray = count, ray
        self.config = DistributionConfig("ray", workers=count)
        self.trainer = RayTrainer(method, model, self.config)
        setups = self.trainer.setups(TrainConfig(edits=2), SEED)
        self.parts = ray.put(self.trainer.parts())
        self.pool = WorkerPool(self.config, setups, self.parts, ray.put(requests), Renewed)
        self.pool.start()
        self.learner = ray.remote(num_cpus=0)(LearnerActor).remote(setups[0], self.parts, "cpu")
        self.begin = self.learner.state.remote()

    def run(self, row: Row, edits: int, first: int = 0):
        """(counts, seconds, version) of ``edits`` edits per worker, trajectories ``first`` on."""
        from hiedit.distributed.controller import Controller
        from hiedit.distributed.transport import unpack

        ray = self.ray
        self.trainer.config = dataclasses.replace(self.config, workers=first + self.count,
                                                  gradient_dtype=row.dtype)  # fmt: skip
        train = TrainConfig(edits=edits * (first + self.count), steps_per_update=row.steps,
                            stream_lengths=[20, 50])  # fmt: skip
        setups = self.trainer.setups(train, SEED)[first:]
        handles = self.pool.handles
        ray.get([h.renew.remote(s) for h, s in zip(handles, setups, strict=True)])
        ray.get(self.learner.load.remote(self.begin))
        config = dataclasses.replace(self.config, mode=row.mode, max_staleness=self.count)
        controller = Controller(config, self.pool, self.learner)
        began = time.perf_counter()
        version = controller.run()
        spent = time.perf_counter() - began
        return controller.counts, spent, unpack(version)


def prepared_method(edits: int):
    model = ModelConfig(dtype="float32", device="cpu")
    backbone = load_backbone(model)
    data = load_data(DatasetConfig(), StreamConfig(length=1), SEED)
    method = load_method("hiedit")
    selector = dataclasses.replace(method.selector, effect_edits=4)  # only where it begins
    method = dataclasses.replace(method, selector=selector)
    model = dataclasses.replace(model, modules=backbone.names)
    return backbone, model, method, data.train, data.preserve


def check(crew: Crew, backbone, method, requests, preserve, edits: int) -> None:
    """One worker has the bits of training in this process."""
    built = build_method(backbone, method, requests, preserve, SEED)
    for part in ("selector", "updater"):
        theirs = getattr(crew.trainer.method.rollout, part).state_dict()
        getattr(built.rollout, part).load_state_dict(theirs)
    built.rollout.updater.reset()
    train = TrainConfig(edits=edits, steps_per_update=1, stream_lengths=[20, 50])
    built.trainer(train, SEED).run(requests, train, SEED)
    here = learned_state({"selector": built.rollout.selector, "updater": built.rollout.updater})
    _, _, there = crew.run(Row(1), edits)
    wrong = [n for n in here if not torch.equal(here[n], there[n])]
    if wrong:
        sys.exit(f"one worker differs from training in this process in {wrong[0]}; no speed is "
                 "reported")  # fmt: skip


def measure(row: Row, one: Crew, two: Crew, edits: int, rounds: int) -> dict[str, float]:
    """Medians over ``rounds`` of one worker twice and two workers once."""
    taken = []
    for number in range(rounds):
        runs = [lambda: [one.run(row, edits, 0), one.run(row, edits, 1)],
                lambda: [two.run(row, edits)]]  # fmt: skip
        order = (0, 1) if number % 2 == 0 else (1, 0)
        done = {k: runs[k]() for k in order}
        single = sum(seconds for _, seconds, _ in done[0])
        counts, pair, _ = done[1][0]
        rest = pair - counts.compute - counts.packing - counts.learn
        taken.append(
            {
                "one": 2 * edits / single,
                "two": 2 * edits / pair,
                "ratio": single / pair,
                "cpu_one": sum(c.cpu for c, _, _ in done[0]) / (2 * edits),
                "cpu_two": counts.cpu / (2 * edits),
                "edit": counts.busy / pair,
                "wait": (counts.compute - counts.busy) / pair,
                "pack": counts.packing / pair,
                "learn": counts.learn / pair,
                "rest": rest / pair,
                "slower": counts.compute / max(counts.busy, 1e-9),
                "up": counts.bytes_up / max(2 * edits / row.steps, 1),
                "down": counts.bytes_down,
                "state": counts.bytes_state,
            }
        )
        told = f"{label(row)}: round {number + 1} of {rounds}, ratio {taken[-1]['ratio']:.2f}"
        print(told, file=sys.stderr, flush=True)
    return {key: statistics.median(t[key] for t in taken) for key in taken[0]}


def rates(megabytes: int = 64) -> dict[str, float]:
    """Bytes per second on one thread: into the object store, added, stepped by Adam."""
    import ray

    from hiedit.distributed.transport import pack

    parameter = torch.nn.Parameter(torch.randn(megabytes << 18))
    gradient = torch.randn_like(parameter)
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = gradient.clone()

    def step():
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        optimizer.step()
        parameter.detach().clone()

    def copy():
        ray.put(pack({"gradient": gradient}))

    def add():
        parameter.grad += gradient

    found = {}
    for name, work in (("copy", copy), ("add", add), ("step", step)):
        work()
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
        found[name] = gradient.nbytes / statistics.median(times)
    return found


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options(__doc__, "8 edits per worker, one round, one row")
    parser.add_argument("--edits", type=int, default=20, help="per worker and run (20)")
    parser.add_argument("--rounds", type=int, default=5, help="of all runs, in alternation (5)")
    parser.add_argument("--rows", default="1,5,5/bfloat16,1/async", help="see above (%(default)s)")
    stated = parser.add_argument_group("of the model, stated and not measured (Llama-3-8B)")
    stated.add_argument("--edit-seconds", type=float, default=1.0, help="per edit of a worker (1)")
    stated.add_argument("--bytes", type=float, default=566e6, help="of the hypernetwork (566e6)")
    state = 12 * 4096 * 14336 * 4
    text = "of the accumulators of the edited modules (12 of 4096 x 14336)"
    stated.add_argument("--state-bytes", type=float, default=state, help=text)
    stated.add_argument("--gigabits", type=float, default=25.0, help="per second and node (25)")
    stated.add_argument("--per-node", type=int, default=8, help="workers of a node (8)")
    args = prepared(parser, argv)
    args.threads = 1
    torch.set_num_threads(1)
    if args.quick:
        args.edits, args.rounds, args.rows = 4, 1, "2"
    try:
        args.rows = [Row.parse(text) for text in args.rows.split(",")]
    except ValueError as error:
        parser.error(str(error))
    if min(args.edits, args.rounds, *(row.steps for row in args.rows)) < 1:
        parser.error("--edits, --rounds and the steps of --rows must be at least 1")
    for row in args.rows:
        if args.edits % row.steps:
            parser.error(f"--edits {args.edits} is no multiple of {row.steps} edits per update")
    return args


def label(row: Row) -> str:
    words = [str(row.steps)]
    words += [row.dtype] if row.dtype != "float32" else []
    words += ["async"] if row.mode == "async" else []
    return " ".join(words)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every row; print what was found and what follows from it."""
    args = arguments(argv)
    require_ray()
    backbone, model, method, requests, preserve = prepared_method(args.edits)
    print(f"{machine(args)}, {len(os.sched_getaffinity(0))} cores, embedded world, method hiedit, "
          f"{args.edits} edits per worker, {args.rounds} round(s) in alternation")  # fmt: skip
    built = build_method(backbone, method, requests, preserve, SEED)
    with session(DistributionConfig("ray", workers=3)):
        one, two = (Crew(built, model, requests, count) for count in (1, 2))
        check(one, backbone, method, requests, preserve, min(args.edits, 6))
        print("one worker has the bits of training in this process")
        two.run(args.rows[0], args.rows[0].steps)  # the first run of a process is slow
        found = {label(row): measure(row, one, two, args.edits, args.rounds) for row in args.rows}
        speed = rates()
    head = ["edits per update", "1: edits/s", "2: edits/s", "ratio", "1: CPU s", "2: CPU s",
            "edit", "wait", "pack", "learn", "rest", "up", "version", "state"]  # fmt: skip
    print("CPU s: of the workers, per edit; shares of the pair's wall time: editing (mean worker), "
          "waiting for the\nslower one, making arrays, the learner, the rest (transfer, control); "
          "MB: a contribution, a version, a state")  # fmt: skip
    lines = [
        [name, f"{m['one']:.2f}", f"{m['two']:.2f}", f"{m['ratio']:.2f}",
         f"{m['cpu_one']:.3f}", f"{m['cpu_two']:.3f}",
         *(f"{m[k]:.1%}" for k in ("edit", "wait", "pack", "learn", "rest")),
         *(f"{m[k] / 1e6:.2f}" for k in ("up", "down", "state"))]
        for name, m in found.items()
    ]  # fmt: skip
    print(table(head, lines))
    print_model(args, found, speed)


def print_model(args: argparse.Namespace, found: dict, speed: dict[str, float]) -> None:
    first = args.rows[0]
    slower = found[label(first)]["slower"] if first.mode == "sync" else 1.2
    variation = max(slower - 1, 0.0) / 0.564 * first.steps**0.5  # E max of two normals: 0.564 sd
    given = Inputs(args.edit_seconds, variation, args.bytes, args.bytes, args.state_bytes,
                   args.gigabits / 8 * 1e9, **speed, per_node=args.per_node)  # fmt: skip
    measured = ", ".join(f"{k} {v / 1e9:.2f} GB/s" for k, v in speed.items())
    print(
        f"\nmodel: stated {given.edit:g} s per edit, {given.gradients / 1e6:.0f} MB of gradients "
        f"and version,\n{given.state / 1e9:.2f} GB of state, {args.gigabits:g} Gbit/s, "
        f"{given.per_node} workers a node; measured variation of an edit {variation:.2f},\n"
        f"one thread: {measured}"
    )
    print("edits per second with so many workers; at most: whatever their number; half: of that")
    print(table(["", *map(str, WORKERS), "at most", "half at"], rows(given)))


if __name__ == "__main__":
    main()
