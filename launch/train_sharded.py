"""Train a method's editor on a model that is larger than one device, with DeepSpeed ZeRO-3.

    deepspeed --num_accelerators 2 launch/train_sharded.py model=world method=hiedit
    deepspeed --hostfile launch/hostfile.example launch/train_sharded.py model=llama-3-70b \\
        method=hiedit dataset=zsre dataset.path=zsre/train.json stream.length=2000
    torchrun --nproc_per_node 8 launch/train_sharded.py model=llama-3-70b \\
        distribution.deepspeed=zero3-offload
    deepspeed --num_accelerators 2 launch/train_sharded.py editor=runs/.../editors/hiedit
    deepspeed --num_accelerators 2 launch/train_sharded.py resume=runs/hiedit-world-world-seed0

Keys and values are those of `launch/train.py --help`; `distribution=deepspeed` is understood.
Every rank runs this program: the model is read shard by shard, weights are gathered layer by layer
for a forward pass, commits touch the rank's own part. Rank 0 shows progress and writes results.
`run_dir` must be seen by all nodes. On machines without a GPU it runs over gloo on the CPU.
`hiedit plan --model DIR` says beforehand whether a model fits. A single node needs no hostfile.
"""

from __future__ import annotations

import os
import sys

STARTED_BY_LAUNCHER = ("--local_rank", "--local-rank")


def main(arguments: list[str]) -> int:
    """Check the configuration, join the ranks, run; returns the exit status."""
    arguments = [a for a in arguments if not a.startswith(STARTED_BY_LAUNCHER)]
    if any(a in ("-h", "--help") for a in arguments):
        print(__doc__)
        return 0
    main_rank = os.environ.get("RANK", "0") == "0"
    try:
        from hiedit.rl.checkpoint import Interrupted
        from hiedit.sharded import require_deepspeed
        from hiedit.sharded.ranks import RankLost

        config, editor = configured(arguments)
        require_deepspeed()
        from hiedit.sharded.run import run_sharded

        run_sharded(config, editor=editor)
        return 0
    except RankLost as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 3
    except (ValueError, ImportError, OSError) as error:
        if main_rank:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except Interrupted as error:
        if main_rank:
            print(f"error: {error}; go on with resume={config.run_dir}", file=sys.stderr)
        return 128 + error.number


def configured(arguments: list[str]):
    """(RunConfig, directory of a trained editor or None) of the command line.

    Raises:
        ValueError: naming the key, its value and what is valid.
    """
    from hiedit.compose import compose
    from hiedit.run import read_config

    given = dict(a.split("=", 1) for a in arguments if a.split("=", 1)[0] in ("resume", "editor"))
    rest = [a for a in arguments if a.split("=", 1)[0] not in given]
    if "resume" in given:
        if rest or "editor" in given:
            raise ValueError(
                f"resume={given['resume']} goes on with the settings it had: give it alone"
            )
        return read_config(given["resume"]), None
    if not any(a.startswith("distribution=") for a in rest):
        rest.append("distribution=deepspeed")
    return compose(rest), given.get("editor")


def end(status: int) -> None:
    """Leave at once where a collective may still be waiting in another thread."""
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)
    from hiedit.sharded.ranks import left

    left()


if __name__ == "__main__":
    end(main(sys.argv[1:]))
