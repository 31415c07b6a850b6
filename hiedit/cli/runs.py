"""Training and measuring: `hiedit demo`, `evaluate`, `doctor`, `world build`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from hiedit.cli.shared import app, friendly, note
from hiedit.demo import (
    REAL,
    REAL_EDITS,
    REAL_METHODS,
    REAL_TRAIN,
    WORLD_EDITS,
    WORLD_METHODS,
    WORLD_TRAIN,
)

world_app = typer.Typer(help="The embedded world: a small Llama that knows real facts.")
app.add_typer(world_app, name="world", no_args_is_help=True)


@app.command()
@friendly
def demo(
    world: Annotated[
        bool, typer.Option("--world", help="edit the small embedded model instead")
    ] = False,
    model: Annotated[
        str, typer.Option(help="another real model: directory, FILE.gguf, or hub name")
    ] = REAL,
    edits: Annotated[
        int | None,
        typer.Option(
            help=f"length of the held-out stream (default: {REAL_EDITS}; world: {WORLD_EDITS})"
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="comma-separated, see configs/method (default: "
            f"{','.join(REAL_METHODS)}; world: {','.join(WORLD_METHODS)})"
        ),
    ] = None,
    train: Annotated[
        int | None,
        typer.Option(
            help=f"training edits of a learned method (default: {REAL_TRAIN}; world: {WORLD_TRAIN})"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="of training, stream and masks")] = 0,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="for results and plots (default: runs/demo, runs/demo-world)"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="world: training processes on Ray (0: without; default: 2 on the CPU)"),
    ] = None,
    jobs: Annotated[int, typer.Option(help="methods at a time (0: one per core, at most 4)")] = 0,
    tracking: Annotated[str, typer.Option(help="auto, mlflow or off")] = "auto",
) -> None:
    """Edit SmolLM2-135M 50 times, fact after fact, with several methods, and show the table.

    The model is asked first what it knows; the edits make other answers of that. One method is
    trained on edits of other subjects before. Nothing is downloaded: `make setup` brought the
    model (`hiedit models get smollm2-135m`). With --world the same on the embedded world, 200
    edits.
    """
    from hiedit.catalogue import load_method
    from hiedit.demo import quicker, real_config, world_config
    from hiedit.distributed.executors import execute

    names = (methods or ",".join(WORLD_METHODS if world else REAL_METHODS)).split(",")
    chosen = [load_method(name.strip()) for name in names if name.strip()]
    if not chosen:
        raise ValueError(f"--methods={methods!r} names no method; try {','.join(REAL_METHODS)}")
    if world and model != REAL:
        raise ValueError(f"--model={model!r}: --world is the demo on the embedded model")
    usual = (WORLD_EDITS, WORLD_TRAIN) if world else (REAL_EDITS, REAL_TRAIN)
    length, training = (u if g is None else g for g, u in zip((edits, train), usual, strict=True))
    place = run_dir or Path("runs/demo-world" if world else "runs/demo")
    if world:
        config = world_config(length, training, seed, place, tracking, _on_ray(workers))
    elif workers:
        raise ValueError(
            f"--workers={workers}: only with --world; a real model trains in one process"
        )
    else:
        config = real_config(model, length, training, seed, place, tracking)
        chosen = [quicker(method) for method in chosen]
    execute(config, chosen, jobs=jobs)


def _on_ray(workers: int | None) -> list[str]:
    """Return what the world's demo says of ``workers``; where none were asked for, two on the CPU
    if Ray is there, and none otherwise."""
    import torch

    from hiedit.distributed import require_ray

    if workers == 0:
        return []
    gpu = torch.cuda.is_available()
    try:
        require_ray()
    except ImportError:
        if workers:
            raise
        note("Ray is not installed (pip install 'hiedit[ray]'): each method trains in one process")
        return []
    if workers is None and gpu:
        note("a GPU is here: each method trains on it in one process (--workers 2: on Ray)")
        return []
    shared = f"distribution.num_gpus={1 / (workers or 2)}" if gpu else "distribution.num_gpus=0"
    return ["distribution=ray", f"distribution.workers={workers or 2}", shared]


@app.command()
@friendly
def evaluate(
    model: Annotated[
        str, typer.Option(help="model directory, FILE.gguf, hub name, or of `hiedit models`")
    ] = "world",
    method: Annotated[
        str, typer.Option(help="a training-free method, or the directory of a trained editor")
    ] = "closed-form",
    dataset: Annotated[str, typer.Option(help="JSON/JSONL file or directory, or `world`")] = (
        "world"
    ),
    modules: Annotated[
        list[str] | None, typer.Option(help="editable modules (repeatable); default: see README")
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate/--no-calibrate", help="measure a model whose modules nobody names"
        ),
    ] = True,
    edits: Annotated[int, typer.Option(help="length of the stream")] = 200,
    n_edits: Annotated[int, typer.Option(help="edits per step")] = 1,
    seed: Annotated[int, typer.Option(help="of the stream")] = 0,
    schema: Annotated[str | None, typer.Option(help="records' schema; default: recognise")] = None,
    skip_bad_rows: Annotated[bool, typer.Option(help="go on past malformed rows")] = False,
    run_dir: Annotated[Path, typer.Option()] = Path("runs/evaluate"),
    tracking: Annotated[str, typer.Option(help="auto, mlflow or off")] = "auto",
) -> None:
    """Edit a lifelong stream with a method and measure ES, GS, LS and retention."""
    from hiedit.catalogue import configured_model, load_method
    from hiedit.compose import compose
    from hiedit.distributed.executors import execute
    from hiedit.experiment import is_editor
    from hiedit.runconfig import DatasetConfig, ModelConfig

    editor = method if is_editor(method) else None
    chosen = None if editor else load_method(method)
    if chosen is not None and chosen.trains:
        raise ValueError(
            f"--method={method}: it has to be trained first (hiedit train "
            f"method={method}); then give its directory, RUN_DIR/editors/{method}"
        )
    config = compose([f"stream.length={edits}", f"stream.n_edits={n_edits}", f"run_dir={run_dir}"])
    known = configured_model(model)
    named = modules or known.get("modules")
    config = dataclasses.replace(
        config,
        model=ModelConfig(Path(model).name, model, named, known.get("dtype", "auto")),
        dataset=DatasetConfig(
            Path(dataset).stem, dataset, schema=schema, skip_bad_rows=skip_bad_rows
        ),
        stream=dataclasses.replace(config.stream, seed=seed),
        tracking=dataclasses.replace(config.tracking, mode=tracking),
        seed=seed,
        calibrate=calibrate,
    )
    execute(config, [chosen] if chosen else [], editor=editor)


@app.command()
def doctor() -> None:
    """Say what is installed, built and found, and what to do about what is missing."""
    from hiedit.doctor import print_report

    raise typer.Exit(print_report())


@world_app.command("build")
@friendly
def world_build(
    out: Annotated[Path, typer.Option(help="directory to write the world to")] = Path("world"),
    seed: Annotated[int, typer.Option(help="of the weights and the order of sentences")] = 0,
    steps: Annotated[int | None, typer.Option(help="fewer for a quick look")] = None,
    collect: Annotated[
        bool, typer.Option(help="collect the facts anew (needs hiedit[world])")
    ] = False,
) -> None:
    """Train the embedded world's model from its facts: under 15 minutes on 2 cores."""
    from hiedit.world.facts import collect_facts
    from hiedit.world.train import build_world

    recall = build_world(out, seed, steps=steps, facts=collect_facts() if collect else None)
    typer.echo(
        f"{recall['facts']} facts; recalled by free generation: seen phrasings "
        f"{recall['seen']:.1%}, held-out phrasings {recall['heldout']:.1%}; written to {out}"
    )
