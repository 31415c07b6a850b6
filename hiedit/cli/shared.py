"""Parts that the commands have in common: the application, options, how mistakes are told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import Annotated

import typer

from hiedit.ledger.errors import LedgerError
from hiedit.parallel import WorkerDied

app = typer.Typer(
    help="Lifelong model editing: correct facts in a language model, thousands of times.\n\n"
    "Start with `hiedit demo`. Training: `hiedit train --help`.\n\n"
    "A model of your own: `hiedit edit`, then `history`, `revert`, `verify`, `export`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)

LedgerOption = Annotated[Path, typer.Option("--ledger", help="directory of the ledger")]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model", help="the base model: directory, FILE.gguf, hub name, or of `hiedit models`"
    ),
]
DtypeOption = Annotated[str, typer.Option(help="of the weights: auto, float32, bfloat16, float16")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="run code that comes with the model")
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="do not ask")]
DEFAULT_LEDGER = Path("edits")


def friendly(command: Callable) -> Callable:
    """A user's mistake is one line on standard error and exit status 2, never a traceback."""

    @wraps(command)
    def wrapper(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:  # `hiedit history | head`; click ends quietly
            raise
        except (ValueError, ImportError, OSError, LedgerError, WorkerDied) as error:
            typer.secho(f"error: {error}", fg="red", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as error:
            number = getattr(error, "number", 2)  # of the signal, where rl.checkpoint noted it
            typer.secho(str(error) or "stopped", err=True)
            raise typer.Exit(128 + number) from None

    return wrapper


def note(text: str) -> None:
    """Something a person should know, beside the results: on standard error."""
    typer.echo(text, err=True)


def confirm(question: str, yes: bool) -> None:
    """Goes on only after a yes; raises ValueError where there is nobody to ask, ends after a no."""
    if yes:
        return
    try:
        agreed = typer.confirm(question, err=True)
    except typer.Abort:
        typer.echo(err=True)
        raise ValueError("not confirmed: nothing was changed (--yes does not ask)") from None
    if not agreed:
        note("nothing was changed")
        raise typer.Exit(1)


def ranges(ids: Iterable[int]) -> str:
    """``1-3 7``: ids as the commands take them."""
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in _runs(sorted(ids)))


def _runs(ids: list[int]) -> Iterator[tuple[int, int]]:
    first = last = None
    for edit in ids:
        if last is not None and edit == last + 1:
            last = edit
            continue
        if last is not None:
            yield first, last
        first = last = edit
    if last is not None:
        yield first, last


def counted(number: int, word: str) -> str:
    """``1 edit``, ``2 edits``."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def size(count: int) -> str:
    """Bytes for people."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def table(headers: list[str], rows: Iterable[Iterable[str]], numbers: Iterable[int] = ()) -> str:
    """Plain aligned columns, for eyes and for grep; ``numbers`` are the columns set right."""
    rows = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    right = set(numbers)

    def line(cells):
        set_ = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(set_).rstrip()

    return "\n".join([line(headers), *map(line, rows)])
