"""`hiedit edit` for a model that is larger than one device, with DeepSpeed ZeRO-3.

    deepspeed --num_accelerators 2 launch/edit_sharded.py --model world --input edits.jsonl \\
        --ledger edits --policy runs/hiedit-world-world-seed0/editors/hiedit
    torchrun --nproc_per_node 8 launch/edit_sharded.py --model /models/llama-3-70b \\
        --input edits.jsonl --deepspeed zero3-offload

Options are those of `hiedit edit --help`. The ranks are on one machine. Every rank computes the
same edits and commits them to its own part of the weights; rank 0 writes the ledger, which has the
bits that one process writes, and shows what became of every row. The result is handed on as ever:
`hiedit history`, `revert`, `verify` and `export` read the ledger.
"""

from __future__ import annotations

import os
import sys


def main(arguments: list[str]) -> int:
    """Run `hiedit edit` as one rank; returns the exit status."""
    given = [a for a in arguments if not a.startswith(("--local_rank", "--local-rank"))]
    if any(a in ("-h", "--help") for a in given):
        print(__doc__)
        return 0
    if not any(a.split("=", 1)[0] == "--deepspeed" for a in given):
        given += ["--deepspeed", "zero3"]
    from hiedit.sharded.ranks import RankLost

    try:
        from hiedit.cli import app

        app(["edit", *given], standalone_mode=True)
    except RankLost as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 3
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def end(status: int) -> None:
    """Leave at once where a collective may still be waiting in another thread."""
    sys.stdout.flush()
    sys.stderr.flush()
    if status > 1:
        os._exit(status)
    from hiedit.sharded.ranks import left

    left()
    # The launcher ends the other ranks of one that fails; a rejected row is no such failure, and
    # rank 0 alone says so.
    sys.exit(status if os.environ.get("RANK", "0") == "0" else 0)


if __name__ == "__main__":
    end(main(sys.argv[1:]))
