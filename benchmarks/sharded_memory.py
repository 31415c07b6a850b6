"""Peak memory of the ranks of one sharded model, loading and training, beside what `hiedit plan`
says.

    python benchmarks/sharded_memory.py                # 2 ranks, hidden 1024, intermediate 4096
    python benchmarks/sharded_memory.py --ranks 4 --layers 8 --method rledit

A Llama with random weights is written as a sharded safetensors checkpoint. As many processes as
there are ranks (gloo, on this machine's CPU) read it, build the method and train on some edits at
full ``back_depth``. Each notes the most it ever held resident (VmHWM of /proc/self/status, set back
before) beyond what it held once everything was imported and the ranks had met:

loading    against ``model / ranks + largest module + largest tensor / ranks``, and the pages of the
           file that is being read, which the system counts as resident while it is mapped;
training   against the plan's parts for one rank, without its allowance for the runtime.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.memory import forget_peak, resident  # noqa: E402
from benchmarks.models import mlp_inputs, random_edits, random_llama  # noqa: E402
from benchmarks.timing import table  # noqa: E402
from benchmarks.train_step import as_request, word_tokenizer  # noqa: E402
from hiedit.catalogue import load_method  # noqa: E402
from hiedit.config import TrainConfig  # noqa: E402
from hiedit.methods import build_method  # noqa: E402
from hiedit.plan.plan import Machines, Plan, facts_of  # noqa: E402
from hiedit.plan.plan import plan as planned  # noqa: E402
from hiedit.runconfig import ModelConfig  # noqa: E402
from hiedit.types import EditBatch  # noqa: E402

MIB = 1 << 20
FILE = 200 << 20  # bytes of one file of the checkpoint


def method_of(args: argparse.Namespace):
    """The composition with less to measure before it starts, at the asked for rank."""
    method = load_method(args.method)
    return dataclasses.replace(
        method,
        selector=dataclasses.replace(method.selector, effect_edits=2),
        updater=dataclasses.replace(method.updater, rank=args.rank),
    )


def model_of(args: argparse.Namespace) -> ModelConfig:
    first = args.layers // 3
    return ModelConfig("random", args.inside or args.place, mlp_inputs(range(first, first + 6)),
                       "float32", "cpu")  # fmt: skip


def write_model(args: argparse.Namespace) -> None:
    model = random_llama(args.hidden, args.intermediate, args.layers, 4, args.vocab)
    model.save_pretrained(args.place, max_shard_size=FILE)
    word_tokenizer(args.vocab).save_pretrained(args.place)


def inside(args: argparse.Namespace) -> None:
    """One rank; prints JSON: bytes by stage, and the tokens of the reward that it saw."""
    from hiedit.sharded.group import Place, lost
    from hiedit.sharded.loading import load_sharded
    from hiedit.sharded.ranks import join, left
    from hiedit.sharded.training import ShardedTrainer

    torch.set_num_threads(1)
    rank, port = map(int, args.at)
    place = Place(rank, args.ranks, port=port)
    variables = {"RANK": rank, "WORLD_SIZE": args.ranks, "LOCAL_RANK": 0,
                 "MASTER_ADDR": place.address, "MASTER_PORT": port}  # fmt: skip
    with lost():
        ranks = join(300, args.ranks, variables)
        forget_peak()
        before = resident(peak=False)
        backbone = load_sharded(model_of(args), ranks, show=False)
        loading, loaded = resident(peak=True), resident(peak=False)
        ranks.barrier()
        forget_peak()
        method = method_of(args)
        stream = random_edits(method.objective.back_depth + args.edits, args.vocab)
        requests = [as_request(edit) for edit in stream]
        pairs = [(p.prompt, p.answer) for r in requests for p in r.locality]
        parts = build_method(backbone, method, requests[:4], pairs)
        building = resident(peak=True)
        forget_peak()
        trainer = ShardedTrainer(parts, TrainConfig(edits=args.edits), ranks)
        for request in requests[: -args.edits]:
            trainer.objective.remember(EditBatch((request,)))
        for number, request in enumerate(requests[-args.edits :]):
            trainer.edit(EditBatch((request,), number))
        peak = resident(peak=True)
    rows = stream[-method.objective.back_depth - 1 :]
    tokens = sum(e.paraphrase[0].numel() + e.locality[0].numel() for e in rows)
    answers = sum(int((e[1] >= 0).sum()) for r in rows for e in (r.paraphrase, r.locality))
    edit = rows[-1].edit[1][0]
    last = int((edit >= 0).sum()) if method.updater.tokens == "answer" else edit.numel() - 1
    print(json.dumps({
        "loading": loading - before, "loaded": loaded - before, "building": building - before,
        "peak": max(building, peak) - before, "training": peak - before,
        "seen": {"tokens": tokens, "answers": answers, "edit_tokens": last},
    }))  # fmt: skip
    left()


def measured(args: argparse.Namespace) -> list[dict]:
    """What every rank told."""
    from hiedit.sharded.group import meeting_place

    _, port = meeting_place()
    names = ("hidden", "intermediate", "layers", "vocab", "rank", "ranks", "edits", "method")
    given = [f"--{name}={getattr(args, name)}" for name in names]
    # What is freed goes back to the system at once, so that the peak is of what was in use.
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *given, "--inside", args.place, "--at", str(r), str(port)],
            stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
        )
        for r in range(args.ranks)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=1800)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        sys.exit("a rank failed; what it said is above")
    return [json.loads(text.splitlines()[-1]) for text in said]


def bound(facts, args: argparse.Namespace) -> int:
    """Bytes of loading, and at most one file's pages."""
    model = facts.parameters * facts.bytes
    return (model + facts.largest * facts.bytes) // args.ranks + facts.largest * facts.bytes


def lines(found: list[dict], plan: Plan, facts, args: argparse.Namespace) -> list[list[str]]:
    need = plan.need_device
    rows = []
    for rank, one in enumerate(found):
        rows.append(
            [str(rank), *(f"{one[k] / MIB:,.0f}" for k in ("loading", "loaded", "building")),
             f"{one['training'] / MIB:,.0f}", f"{need / MIB:,.0f}", f"{need / one['peak']:.2f}"]
        )  # fmt: skip
    return rows


def main() -> None:
    """Measure, compare, print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = (("hidden", 1024), ("intermediate", 4096), ("layers", 12), ("vocab", 3000),
             ("rank", 64), ("ranks", 2), ("edits", 2))  # fmt: skip
    for name, value in sizes:
        parser.add_argument(f"--{name}", type=int, default=value, help=f"({value})")
    parser.add_argument("--method", default="hiedit", help="of configs/method (hiedit)")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--at", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.layers < 8 or args.ranks < 2:
        parser.error(f"--layers {args.layers} must be at least 8, --ranks {args.ranks} at least 2")
    if args.inside:
        return inside(args)
    with tempfile.TemporaryDirectory() as args.place:
        write_model(args)
        facts = facts_of(model_of(args))
        found = measured(args)
    plan = planned(facts, method_of(args), Machines(args.ranks, gpu=False), **found[0]["seen"])
    size = facts.parameters * facts.bytes
    print(
        f"{args.ranks} ranks, Llama {args.layers} x {args.hidden}/{args.intermediate}, fp32, "
        f"{size / MIB:,.0f} MiB in files of at most {FILE / MIB:.0f}; {args.method}, rank "
        f"{args.rank}, 12 modules; MiB beyond the imports"
    )
    columns = ["rank", "loading", "loaded", "building", "training", "plan", "plan/measured"]
    print(table(columns, lines(found, plan, facts, args)))
    print(
        f"loading: without the file's pages at most {bound(facts, args) / MIB:,.0f}\nplan: "
        + ", ".join(f"{name} {value / MIB:,.0f}" for name, value in plan.device.items())
    )


if __name__ == "__main__":
    main()
