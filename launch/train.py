"""Train a method's editor and measure it on a held-out lifelong stream.

    python launch/train.py method=hiedit model=world dataset=world stream.length=200
    python launch/train.py method=rledit dataset=counterfact dataset.path=counterfact/train.json
    python launch/train.py --help            # every key with its default
    python launch/train.py --multirun method=hiedit,random seed=0,1,2
    python launch/train.py method=hiedit distribution=ray distribution.workers=4
    python launch/train.py resume=runs/hiedit-world-world-seed0

It composes the configuration with Hydra, checks all of it before a model is loaded, trains in
this process or on Ray, edits the stream, and writes results.json, plots and the trained editor to
`run_dir`. Ray starts and stops by itself; on a cluster this script is the job that
`ray job submit` runs (launch/submit.sh). A run that was killed goes on from its last checkpoint
with `resume=RUN_DIR`, with the configuration that it had.
With MLflow installed the run is tracked; the command to look at it is printed at the end.
"""

from __future__ import annotations

import sys


def main() -> int:
    """`hiedit train` as a script; returns the exit status."""
    from hiedit.cli.train import train

    return train(sys.argv[1:], "python launch/train.py")


if __name__ == "__main__":
    sys.exit(main())
