"""`hiedit history`, `revert`, `restore`, `verify`, `export`, `compact`: what is done to a ledger
afterwards. Only `export`, and `verify` where it is given one, load a model."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from hiedit.cli.selection import chosen
from hiedit.cli.shared import (
    DEFAULT_LEDGER,
    DeviceOption,
    DtypeOption,
    LedgerOption,
    ModelOption,
    TrustOption,
    YesOption,
    app,
    confirm,
    counted,
    friendly,
    note,
    ranges,
    size,
    table,
)

ASK_ABOVE = 10  # edits that are reverted or restored without a question

IdsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[ID...]", help="ids, or ranges such as 5-9")
]
SinceOption = Annotated[
    str | None, typer.Option(help="all from an id or a date on (2026-01-31, 2026-01-31T14:00; UTC)")
]


@app.command()
@friendly
def history(
    ledger: LedgerOption = DEFAULT_LEDGER,
    as_json: Annotated[bool, typer.Option("--json", help="one line of JSON per edit")] = False,
    status: Annotated[
        str | None, typer.Option(help="only: active, reverted, folded or dropped")
    ] = None,
    last: Annotated[int | None, typer.Option(min=1, help="only the newest N")] = None,
    events: Annotated[
        bool, typer.Option("--events", help="what was done to the ledger, instead of its edits")
    ] = False,
) -> None:
    """Show what was edited, when, in which layers, whether it is in effect. Works beside a writer.

    Example: `hiedit history --ledger edits --status active --last 20`

    Every edit as JSON: `hiedit history --ledger edits --json | jq .request.prompt`
    """
    from hiedit.ledger.records import STATUSES

    if status is not None and status not in STATUSES:
        raise ValueError(f"--status={status!r}: valid are {', '.join(STATUSES)}")
    if events and status:
        raise ValueError("--status: events have none; leave out --status or --events")
    with _reader(ledger) as reader:
        found = reader.events() if events else reader.history()
    if status:
        found = [record for record in found if record.status == status]
    found = found[-last:] if last else found
    if as_json:
        for item in found:
            typer.echo(json.dumps(dataclasses.asdict(item), ensure_ascii=False))
    else:
        typer.echo(_events(found) if events else _history(found))


@app.command()
@friendly
def revert(
    ids: IdsArgument = None,
    ledger: LedgerOption = DEFAULT_LEDGER,
    since: SinceOption = None,
    last: Annotated[int | None, typer.Option(min=1, help="the newest N in effect")] = None,
    yes: YesOption = False,
) -> None:
    """Take edits out: any subset, in any order. They stay in the ledger and can be restored.

    Needs no model: the weights are computed from the ledger whenever it is opened, and are then
    bit for bit those without these edits. What was exported before keeps them: export it again.

    Example: `hiedit revert 12 17-20 --ledger edits`, `hiedit revert --last 1 --ledger edits`
    """
    _turn("revert", ids, ledger, since, last, yes)


@app.command()
@friendly
def restore(
    ids: IdsArgument = None,
    ledger: LedgerOption = DEFAULT_LEDGER,
    since: SinceOption = None,
    last: Annotated[int | None, typer.Option(min=1, help="the newest N reverted")] = None,
    yes: YesOption = False,
) -> None:
    """Put reverted edits back at their places in the order: as if they had never been reverted.

    Example: `hiedit restore 12 --ledger edits`, `hiedit restore --since 2026-01-31 --ledger edits`
    """
    _turn("restore", ids, ledger, since, last, yes)


@app.command()
@friendly
def verify(
    ledger: LedgerOption = DEFAULT_LEDGER,
    model: Annotated[
        str | None, typer.Option(help="base model: also ask it whether its edits still hold")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Read every byte of a ledger again; with a model, ask whether its edits still hold.

    Example: `hiedit verify --ledger edits`, `hiedit verify --ledger edits --model world`

    Exit status: 0 if all is well; 1 if something is damaged, or an edit that gave the new answer
    when it was committed no longer does (later edits may have undone it); 2 for a mistake.
    """
    from hiedit.ledger.errors import DamagedError

    try:
        with _reader(ledger) as reader:
            found = reader.verify()
    except DamagedError as error:
        typer.echo(f"damaged: {error}")
        raise typer.Exit(1) from None
    typer.echo(
        f"{ledger}: {counted(found.edits, 'edit')}, {counted(found.segments, 'segment')}, "
        f"{counted(found.snapshots, 'snapshot')}, {counted(found.attachments, 'attachment')}, "
        f"{size(found.bytes)}: " + ("every checksum fits" if found.ok else "damaged")
    )
    for problem in found.problems:
        typer.echo(f"damaged: {problem}")
    if not found.ok:
        raise typer.Exit(1)
    if model is not None:
        _verify_held(model, ledger, dtype, device, trust_remote_code)


@app.command()
@friendly
def export(
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="directory to write to")],
    ledger: LedgerOption = DEFAULT_LEDGER,
    kind: Annotated[
        str, typer.Option("--format", help="merged: a whole checkpoint; peft: a LoRA adapter")
    ] = "merged",
    rank: Annotated[int | None, typer.Option(min=1, help="peft: of any module, at most")] = None,
    max_error: Annotated[
        float | None, typer.Option(help="peft: relative error of any module's delta, at most")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace whatever files the directory holds")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Hand the edited model on: as a merged checkpoint, or as a PEFT adapter for the base model.

    Reads the ledger only and works beside a writer. An adapter is exact where no rank is given,
    else the best of that rank; its error is measured and printed, worst module first.

    Example: `hiedit export --model world --ledger edits --format peft --out adapter`

    Exit status: 1 if --max-error cannot be met with --rank (the adapter is written all the same).
    """
    from hiedit.ledger.directory import check_target
    from hiedit.replayed import Replayed

    if kind not in ("merged", "peft"):
        raise ValueError(f"--format={kind!r}: valid are merged and peft")
    if kind == "merged" and (rank is not None or max_error is not None):
        raise ValueError("--rank, --max-error: a merged checkpoint is exact; use --format peft")
    if max_error is not None and not 0 < max_error < 1:
        raise ValueError(f"--max-error={max_error}: it must be more than 0 and less than 1")
    check_target(out, overwrite)
    options = dict(dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    with Replayed.open(model, ledger, **options) as edited:
        in_effect = edited.state.edits
        if kind == "merged":
            edited.save_pretrained(out, overwrite)
            typer.echo(_merged(out, in_effect))
            return
        report = edited.export_adapter(out, rank, max_error, overwrite)
    typer.echo(_adapter(report, in_effect, model, edited.backbone.model.dtype))
    if not report.bound_met:
        note(f"--max-error={max_error} is not met with --rank={rank}: see the table")
        raise typer.Exit(1)


@app.command()
@friendly
def compact(
    ledger: LedgerOption = DEFAULT_LEDGER,
    keep: Annotated[
        int | None,
        typer.Option(min=0, help="also fold all but the newest N for good: no revert afterwards"),
    ] = None,
    yes: YesOption = False,
) -> None:
    """Pack the files of a ledger and remove what is not needed. No weight changes by a bit.

    Example: `hiedit compact --ledger edits`, `hiedit compact --ledger edits --keep 1000`
    """
    from hiedit.ledger.offline import compacted

    if keep is not None:
        with _reader(ledger) as reader:
            old = reader.history()[: -keep or None]
        kinds = {s: sum(r.status == s for r in old) for s in ("active", "reverted")}
        if any(kinds.values()):
            confirm(
                f"{counted(kinds['active'], 'edit')} can then never be reverted and "
                f"{kinds['reverted']} that are reverted never be restored; this cannot be undone. "
                "Go on?",
                yes,
            )
    done = compacted(ledger, keep)
    folded = f"; folded {ranges(done.folded)}" if done.folded else ""
    dropped = f"; dropped {ranges(done.dropped)}" if done.dropped else ""
    typer.echo(
        f"{ledger}: {size(done.bytes_before)} -> {size(done.bytes_after)}, "
        f"{done.segments_before} -> {counted(done.segments_after, 'segment')}{folded}{dropped}"
    )


def _reader(ledger: Path):
    from hiedit.ledger.reader import Reader

    return Reader(ledger.expanduser().absolute(), None)


def _turn(
    what: str, ids: list[str] | None, ledger: Path, since: str | None, last: int | None, yes: bool
) -> None:
    """Reverts or restores the edits that the command names."""
    from hiedit.ledger.offline import TURNS, change

    old, _ = TURNS[what]
    with _reader(ledger) as reader:
        named = chosen(what, reader.history(), old, ids or [], since, last)
    if len(named) > ASK_ABOVE:
        confirm(f"{what} {len(named)} edits ({ranges(named)})?", yes)
    changed = ranges(change(ledger, what, named))
    with _reader(ledger) as reader:
        left = reader.in_effect()
    done, back = ("reverted", "restore") if what == "revert" else ("restored", "revert")
    typer.echo(
        f"{done} {counted(len(set(named)), 'edit')} ({changed}); {left} in effect; "
        f"undo with: hiedit {back} {changed} --ledger {shlex.quote(str(ledger))}"
    )


def _history(records: list) -> str:
    if not records:
        return "no edits"
    return table(
        ["id", "committed (UTC)", "status", "layers", "success", "edit"],
        (
            (r.id, r.created[:19].replace("T", " "), r.status, len(r.layers), _success(r),
             " ".join(f"{r.request.prompt} -> {r.request.target}".split()))
            for r in records
        ),
        numbers=(0, 3, 4),
    )  # fmt: skip


def _success(record) -> str:
    value = record.report.get("success")
    return "-" if value is None else f"{value:.2f}"


def _events(events: list) -> str:
    return "\n".join(
        f"{e.time[:19].replace('T', ' ')}  {e.what:<9}{ranges(e.ids)}".rstrip() for e in events
    )


def _verify_held(model: str, ledger: Path, dtype: str, device: str, trust: bool) -> None:
    from hiedit.replayed import Replayed

    options = dict(dtype=dtype, device=device, trust_remote_code=trust)
    with Replayed.open(model, ledger, **options) as edited:
        held = edited.holding()
    typer.echo(
        f"{counted(held.checked, 'edit')} asked again on {model}: success {held.success_then:.3f} "
        f"when committed, {held.success_now:.3f} now"
    )
    if held.lost:
        typer.echo(f"no longer as when committed: {ranges(held.lost)}")
        raise typer.Exit(1)


def _merged(out: Path, in_effect: int) -> str:
    total = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    return (
        f"{out}: {counted(in_effect, 'edit')} merged, {size(total)}\n"
        f"load with: AutoModelForCausalLM.from_pretrained({str(out)!r})"
    )


def _adapter(report, in_effect: int, model: str, dtype) -> str:
    modules = sorted(report.modules, key=lambda m: -m.error)
    rows = [
        (m.name, m.rank, "-" if m.rows is None else m.rows, f"{m.error:.1e}",
         f"{m.served_error:.1e}") for m in modules
    ]  # fmt: skip
    base = repr(report.base_name or model)
    dtype = repr(str(dtype).removeprefix("torch."))
    return "\n".join(
        [
            table(["module", "rank", "rows", "error of the delta", "of W as served"], rows,
                  numbers=(1, 2, 3, 4)),
            f"{report.directory}: {counted(in_effect, 'edit')}, {size(report.bytes)}, "
            + ("exact" if report.exact else f"worst error {report.worst.error:.1e}"),
            "load with: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("
            f"{base}, dtype={dtype}), {str(report.directory)!r})",
        ]
    )  # fmt: skip
