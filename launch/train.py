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

MISSING = "launch/train.py needs {name}: pip install 'hiedit[cli]'"


def main() -> int:
    """Check the overrides as one, then hand over to Hydra; returns the exit status."""
    try:
        import hydra
        from omegaconf import DictConfig, OmegaConf
    except ImportError as error:
        print(MISSING.format(name=error.name), file=sys.stderr)
        return 2

    from hiedit.catalogue import config_dir
    from hiedit.compose import compose, register_schema
    from hiedit.config import from_mapping
    from hiedit.parallel import WorkerDied
    from hiedit.rl.checkpoint import Interrupted
    from hiedit.run import read_config, run
    from hiedit.runconfig import RunConfig

    flags = [a for a in sys.argv[1:] if a.startswith("-")]
    resume = [a.removeprefix("resume=") for a in sys.argv[1:] if a.startswith("resume=")]
    failed, status = [], 2

    def attempt(config: RunConfig) -> None:
        nonlocal status
        try:
            run(config)
        except (ValueError, ImportError, FileNotFoundError, WorkerDied) as error:
            failed.append(str(error))
        except Interrupted as error:
            failed.append(f"{error}; go on with: python launch/train.py resume={config.run_dir}")
            status = 128 + error.number

    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
    def job(config: DictConfig) -> None:
        try:
            checked = from_mapping(RunConfig, OmegaConf.to_container(config, resolve=True))
        except ValueError as error:
            failed.append(str(error))
        else:
            attempt(checked)

    register_schema()
    try:
        if resume and len(sys.argv) > 2:
            raise ValueError(f"resume={resume[0]} goes on with the settings it had: give it alone")
        config = read_config(resume[0]) if resume else None
        if not (resume or flags):
            compose(sys.argv[1:])
    except ValueError as error:
        failed.append(str(error))
    if not failed:
        job() if config is None else attempt(config)
    for message in failed:
        print(f"error: {message}", file=sys.stderr)
    return status if failed else 0


if __name__ == "__main__":
    sys.exit(main())
