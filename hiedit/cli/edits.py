"""`hiedit edit`: requests from a file or a pipe, each on disk before it is acknowledged."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from hiedit.cli.shared import (
    DEFAULT_LEDGER,
    DeviceOption,
    DtypeOption,
    LedgerOption,
    ModelOption,
    TrustOption,
    app,
    friendly,
)
from hiedit.limits import MAX_DRIFT, MAX_KL, Guard
from hiedit.progress import Progress, Update

STDIN = Path("-")


@app.command()
@friendly
def edit(
    model: ModelOption,
    source: Annotated[
        Path, typer.Option("--input", help="JSONL or JSON file, or - for JSONL on standard input")
    ],
    ledger: LedgerOption = DEFAULT_LEDGER,
    method: Annotated[
        str, typer.Option(help="a training-free method (configs/method), or a YAML file")
    ] = "closed-form",
    policy: Annotated[
        Path | None, typer.Option(help="directory of a trained editor, instead of --method")
    ] = None,
    modules: Annotated[
        list[str] | None,
        typer.Option(help="editable modules (repeatable); default: the ledger's, else see README"),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate/--no-calibrate", help="measure a model whose modules nobody names"
        ),
    ] = True,
    max_kl: Annotated[
        str | None,
        typer.Option(help=f"nats that one edit may move watched prompts, or none [{MAX_KL:g}]"),
    ] = None,
    max_drift: Annotated[
        str | None,
        typer.Option(help=f"the same of all edits, from the base model, or none [{MAX_DRIFT:g}]"),
    ] = None,
    max_local_kl: Annotated[
        float | None, typer.Option(help="reject edits that move a row's locality prompts by more")
    ] = None,
    min_success: Annotated[
        float | None, typer.Option(help="reject edits that answer a smaller share of their prompts")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what each edit would do; commit nothing")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="one line of JSON per row (always so with --input -)")
    ] = False,
    schema: Annotated[str | None, typer.Option(help="records' schema; default: recognise")] = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="malformed rows are no failure")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    deepspeed: Annotated[
        str | None,
        typer.Option(
            help="this process is a rank of a launcher (launch/edit_sharded.py): zero3, "
            "zero3-offload or a JSON"
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="with --deepspeed: seconds until a silent rank counts as lost")
    ] = 600.0,
    trust_remote_code: TrustOption = False,
) -> None:
    """Apply edit requests to a model; every edit is on disk before it is acknowledged.

    A row is {"prompt": "The capital of France is", "target": "Lyon"}, with "paraphrases" and
    "locality" prompts where there are any, or of a schema that `hiedit evaluate` reads. The model's
    directory is not touched: the ledger holds the edits, `hiedit export` hands the result on.

    An edit that moves what it should not touch (the model's own answers to prompts that have
    nothing to do with it) by more than --max-kl, or the sum of all edits by more than --max-drift,
    is made smaller, and rejected where it then no longer holds (docs/safety.md).

    Example: `hiedit edit --model world --input edits.jsonl --ledger edits`

    A pipe: `produce | hiedit edit --model world --input - | consume`. Each line is acknowledged
    by a line of JSON with line, status (committed, skipped, rejected, predicted, invalid), id,
    success, kl, drift, scale, layers, passes, reasons and conflicts, as soon as its edit is on
    disk.

    A model larger than one device: launch/edit_sharded.py, with the same options.

    Exit status: 0; 1 if a row was rejected or malformed (the others are applied all the same; of
    a file with malformed rows nothing is applied unless --skip-bad-rows is given); 2 if the
    command could not go on.
    """
    from hiedit.catalogue import load_method
    from hiedit.cli.report import Report
    from hiedit.cli.requests import from_file, from_lines
    from hiedit.experiment import WORLD, is_editor, model_path
    from hiedit.ledger.offline import check_free

    limits = Guard.of(model in (WORLD, model_path(WORLD)))
    limits = dataclasses.replace(limits, min_success=min_success, max_local_kl=max_local_kl)
    guard = limits.given(max_kl=max_kl, max_drift=max_drift)
    piped = source == STDIN
    rows = (
        from_lines(sys.stdin.buffer, schema) if piped else from_file(source, schema, skip_bad_rows)
    )
    if policy is None and is_editor(method):
        policy = Path(method)
    if policy is None:
        load_method(method)
    elif not is_editor(str(policy)):
        raise ValueError(
            f"--policy={policy}: no trained editor there (method.json); training writes them to "
            "RUN_DIR/editors/METHOD"
        )
    if deepspeed is not None:
        _check_ranks(piped, dry_run)
    if deepspeed is None or os.environ.get("RANK") == "0":  # one writer at a time
        check_free(ledger)
    options = dict(
        method=method, modules=modules, policy=policy, guard=guard, dtype=dtype, device=device,
        trust_remote_code=trust_remote_code, calibrate=calibrate,
    )  # fmt: skip
    report = Report(ledger, as_json or piped, skip_bad_rows)
    if deepspeed is not None:
        from hiedit.sharded.editing import ShardedEditor, editing_ranks

        with editing_ranks(timeout) as ranks:
            editor = ShardedEditor.over(ranks, model, deepspeed, ledger=ledger, **options)
            _apply(editor, rows, report)
    else:
        from hiedit.editor import Editor

        with _place(ledger, dry_run) as place:
            editor = Editor.from_pretrained(model, ledger=place, **options)
            _apply(editor, rows, report, dry_run)
    raise typer.Exit(report.status)


def _check_ranks(piped: bool, dry_run: bool) -> None:
    from hiedit.sharded import require_deepspeed

    require_deepspeed()
    if piped:
        raise ValueError("--input - with --deepspeed: every rank reads the requests; give a file")
    if dry_run:
        raise ValueError("--dry-run with --deepspeed: not over several ranks; leave one out")


@contextlib.contextmanager
def _place(ledger: Path, dry_run: bool) -> Iterator[Path]:
    """The ledger; for a dry run where there is none, one that is gone afterwards."""
    if not dry_run or (ledger.expanduser() / "ledger.db").is_file():
        yield ledger
        return
    with tempfile.TemporaryDirectory(prefix="hiedit-dry-run-") as directory:
        yield Path(directory) / "ledger"


def _apply(editor, rows: Iterable, report, dry_run: bool = False) -> None:
    total = len(rows) if isinstance(rows, list) else None
    with editor:
        try:
            with contextlib.nullcontext() if report.as_json else Progress() as progress:
                for done, row in enumerate(rows, 1):
                    report.add(row, _one(editor, row, dry_run), editor)
                    if not report.as_json:
                        stage = "predicting" if dry_run else "editing"
                        progress.show(Update(editor.method, stage, done, total))
        finally:
            report.close()


def _one(editor, row, dry_run: bool):
    """Return what became of one row; a request that cannot be applied does not stop those after
    it."""
    from hiedit.edited import REJECTED, Edited

    if row.request is None:
        return None
    try:
        return next(editor.apply([row.request], dry_run))
    except ValueError as error:  # nothing was changed, see Ledger.commit
        return Edited(row.request, REJECTED, reasons=(str(error),))
