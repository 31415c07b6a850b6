"""`hiedit calibrate`: where a model's edits take, at what price, and how large a step may be."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated

import typer

from hiedit.cli.shared import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    TrustOption,
    app,
    friendly,
    note,
    table,
)


@app.command()
@friendly
def calibrate(
    model: ModelOption,
    source: Annotated[
        Path | None,
        typer.Option("--input", help="records to measure with; default: facts of the world"),
    ] = None,
    edits: Annotated[int, typer.Option(min=1, help="made in every module")] = 16,
    out: Annotated[Path | None, typer.Option(help="write the JSON here too")] = None,
    force: Annotated[bool, typer.Option("--force", help="measure again")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the JSON, no table")] = False,
    schema: Annotated[str | None, typer.Option(help="records' schema; default: recognise")] = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="go on past malformed rows")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure a model: its sinks, what each module does to an edit and at what price, the step.

    The result is kept in the cache by the model's fingerprint, and `hiedit edit` uses it where no
    modules are named. It is measured once; --force, --input or --edits measure again. Rows of
    --input need the old answer, by which the model is asked whether it knows the fact.

    Example: `hiedit calibrate --model /models/my-llm`
    """
    from hiedit.calibrating import calibration_for
    from hiedit.calibration import place
    from hiedit.catalogue import configured_model
    from hiedit.data.records import load_records
    from hiedit.experiment import load_backbone
    from hiedit.runconfig import ModelConfig

    requests = None
    if source is not None:
        requests = load_records(source, schema=schema, skip_bad_rows=skip_bad_rows).requests
    if dtype == "auto":
        dtype = configured_model(model).get("dtype", dtype)
    config = ModelConfig(Path(model).name, model, None, dtype, device, trust_remote_code)
    backbone = load_backbone(config)
    again = force or requests is not None or edits != 16
    found = calibration_for(backbone, config.name, requests=requests, edits=edits, again=again)
    kept = [place(found.fingerprint)]
    if out is not None:
        from hiedit.calibration import write

        kept.append(write(found, out))
    if as_json:
        typer.echo(found.as_json(), nl=False)
        return
    _show(found)
    note(f"{found.seconds:.0f} s to measure; kept in {' and '.join(map(str, kept))}")


def _show(found) -> None:
    from hiedit.calibration import owned

    rows = [
        [
            _layer(p.name), p.name.rsplit(".", 1)[-1], f"{p.sink_ratio:.1f}",
            f"{p.sink_share:.0%}", _number(p.gain), _number(p.price),
            "edited" if p.name in found.modules else "owned by sinks" if owned(p) else "",
        ]
        for p in found.profiles
    ]  # fmt: skip
    heads = ["layer", "module", "sink ratio", "sink share", "gain", "price", ""]
    typer.echo(table(heads, rows, (0, 2, 3, 4, 5)))
    typer.echo()
    steps = [
        [f"{s.eta:g}", f"{s.success:.0%}", f"{s.passes:.1f}", _number(s.kl),
         "chosen" if s.eta == found.eta else ""]
        for s in found.steps
    ]  # fmt: skip
    typer.echo(table(["step", "success", "passes", "KL", ""], steps, (0, 1, 2, 3)))
    typer.echo()
    typer.echo(
        f"{found.model}, measured {found.created} on {found.edits} edits ({found.known} of facts "
        "that it knows); gain, price and KL in nats"
    )


def _layer(name: str) -> str:
    numbers = re.search(r"\.(\d+)\.", name)
    return numbers[1] if numbers else ""


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"
