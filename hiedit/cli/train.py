"""`hiedit train` and `hiedit compare`: runs out of Hydra overrides, and runs side by side.

`launch/train.py` is the same as `hiedit train`, as a script that `ray job submit` can run.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from hiedit.cli.shared import app, friendly
from hiedit.evaluation.results import DETAILS, MethodResult, read_details

HYDRAS = {
    "allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": [],
}  # fmt: skip


@app.command("train", context_settings=HYDRAS, add_help_option=False)
def train_command(context: typer.Context) -> None:
    """Train a method's editor and measure it on a held-out lifelong stream (Hydra overrides)."""
    raise typer.Exit(train(context.args, "hiedit train"))


@app.command("compare")
@friendly
def compare_command(
    runs: Annotated[list[Path], typer.Argument(help="run directories, or results.json in them")],
    examples: Annotated[int, typer.Option(help="edits of the best method in words")] = 3,
    plots: Annotated[Path | None, typer.Option(help="directory to write plots to")] = None,
) -> None:
    """Show the results of any runs in one table.

    Other seeds of the same method make one row: their mean, with the standard deviation below it.
    The same seed in several runs makes a row for each run. Runs of different streams are told in a
    note, as their figures cannot be compared.
    """
    results = _apart([(run, result) for run in runs for result in _results(run)])
    streams = {result.stream for result in results}
    if len(streams) > 1:
        typer.echo(f"note: the runs edited {len(streams)} different streams", err=True)
    from hiedit.evaluation.report import report

    report(results, examples)
    if plots is not None:
        from hiedit.plots import save_plots

        for path in save_plots(results, plots):
            typer.echo(str(path))


def _apart(found: list[tuple[Path, MethodResult]]) -> list[MethodResult]:
    """Return the results; a method with one seed in several runs is named by its run there."""
    counts = Counter(result.key for _, result in found)
    twice = {key[0] for key, count in counts.items() if count > 1}
    return [
        dataclasses.replace(r, method=f"{r.method} ({run})") if r.method in twice else r
        for run, r in found
    ]


def _results(run: Path) -> list[MethodResult]:
    directory = run.parent if run.suffix == ".json" else run
    if not (directory / DETAILS).is_file():
        raise ValueError(f"{run}: no run with results ({directory / DETAILS} is missing)")
    found = read_details(directory)
    if not found:
        raise ValueError(f"{run}: {DETAILS} holds no result")
    return found


def train(arguments: Sequence[str], program: str) -> int:
    """Check the overrides as one, then hand over to Hydra; returns the exit status. program: what
    a person typed before the ``arguments``."""
    try:
        import hydra
        from omegaconf import DictConfig, OmegaConf
    except ImportError as error:
        print(f"{program} needs {error.name}: pip install 'hiedit[cli]'", file=sys.stderr)
        return 2

    from hiedit.catalogue import config_dir
    from hiedit.compose import register_schema
    from hiedit.config import from_mapping
    from hiedit.runconfig import RunConfig

    failed: list[tuple[str, int]] = []

    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
    def job(config: DictConfig) -> None:
        try:
            checked = from_mapping(RunConfig, OmegaConf.to_container(config, resolve=True))
        except ValueError as error:
            failed.append((str(error), 2))
        else:
            failed.extend(_attempt(checked, program))

    register_schema()
    try:
        config = _checked(arguments)
    except ValueError as error:
        failed.append((str(error), 2))
    else:
        if config is not None:
            failed.extend(_attempt(config, program))
        else:
            before, sys.argv = sys.argv, [program, *arguments]
            try:
                job()
            finally:
                sys.argv = before
    for message, _ in failed:
        print(f"error: {message}", file=sys.stderr)
    return failed[-1][1] if failed else 0


def _checked(arguments: Sequence[str]):
    """The configuration of a run that goes on; None for one that Hydra is to compose, whose
    overrides are found to be valid here (in words; flags are Hydra's own affair)."""
    from hiedit.compose import compose
    from hiedit.run import read_config

    resume = [a.removeprefix("resume=") for a in arguments if a.startswith("resume=")]
    if resume and len(arguments) > 1:
        raise ValueError(f"resume={resume[0]} goes on with the settings it had: give it alone")
    if resume:
        return read_config(resume[0])
    if not any(a.startswith("-") for a in arguments):
        compose(list(arguments))
    return None


def _attempt(config, program: str) -> list[tuple[str, int]]:
    """Run, and return what went wrong, with the exit status; nothing where the run came to its
    end."""
    from hiedit.distributed.executors import execute
    from hiedit.parallel import WorkerDied
    from hiedit.rl.checkpoint import Interrupted

    try:
        execute(config)
    except (ValueError, ImportError, FileNotFoundError, WorkerDied) as error:
        return [(str(error), 2)]
    except Interrupted as error:
        told = f"{error}; go on with: {program} resume={config.run_dir}"
        return [(told, 128 + error.number)]
    return []
