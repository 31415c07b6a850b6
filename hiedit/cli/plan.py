"""`hiedit plan`: what a run needs where, before anything is loaded or rented."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hiedit.cli.shared import TrustOption, app, friendly, note, size, table


@app.command()
@friendly
def plan(
    model: Annotated[
        str,
        typer.Option(help="of configs/model (llama-3-70b), or a directory or FILE.gguf"),
    ] = "world",
    method: Annotated[str, typer.Option(help="of configs/method, or a YAML file")] = "hiedit",
    modules: Annotated[
        list[str] | None, typer.Option(help="editable modules (repeatable); default: the model's")
    ] = None,
    devices: Annotated[int, typer.Option(help="GPUs in all (with --cpu: ranks)")] = 1,
    memory: Annotated[float, typer.Option(help="of one device, GB")] = 80.0,
    hosts: Annotated[int, typer.Option(help="machines they are in")] = 1,
    host_memory: Annotated[float, typer.Option(help="of one machine, GB")] = 1000.0,
    offload: Annotated[
        bool, typer.Option("--offload", help="weights in the hosts' memory")
    ] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="no GPU: ranks share the host")] = False,
    back_depth: Annotated[int | None, typer.Option(help="of the reward; default: method's")] = None,
    rank: Annotated[int | None, typer.Option(help="of the hypernetwork; default: method's")] = None,
    dtype: Annotated[str | None, typer.Option(help="of the weights; default: the model's")] = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Show what is stored where, whether it fits, and the cheapest change that makes it fit.

    Only the model's config.json is read. Example, Llama-3-70B on 8 GPUs of 80 GB:
    `hiedit plan --model llama-3-70b --devices 8 --memory 80`

    Changes are tried in this order: half precision, offloading (same results, slower), a smaller
    back_depth, a smaller hypernetwork, more devices. Exit status 1 if it does not fit as asked.
    """
    import dataclasses

    from hiedit.catalogue import load_method
    from hiedit.plan.plan import Machines, cheapest, facts_of
    from hiedit.plan.plan import plan as make

    config = _model(model, modules, dtype, trust_remote_code)
    chosen = load_method(method)
    if back_depth is not None:
        changed = dataclasses.replace(chosen.objective, back_depth=back_depth)
        chosen = dataclasses.replace(chosen, objective=changed)
    if rank is not None:
        chosen = dataclasses.replace(chosen, updater=dataclasses.replace(chosen.updater, rank=rank))
    gb = 1000**3
    machines = Machines(devices, int(memory * gb), hosts, int(host_memory * gb), not cpu, offload)
    facts = facts_of(config)
    asked = make(facts, chosen, machines)
    _show(facts, chosen.name, asked)
    if asked.fits:
        typer.echo("It fits.")
        return
    found = cheapest(facts, chosen, machines)
    if found is None:
        note("It does not fit, and none of the changes that were tried makes it fit.")
    else:
        m = found.machines
        typer.echo(
            f"It does not fit. Cheapest change that makes it fit: {found.change}: "
            f"{size(found.need_device)} of {size(m.memory)} a device, "
            f"{size(found.need_host)} of {size(m.host_memory)} a host."
        )
    raise typer.Exit(1)


def _model(model: str, modules, dtype: str | None, trust: bool):
    import dataclasses

    import yaml

    from hiedit.catalogue import config_dir, configured_model
    from hiedit.config import from_mapping
    from hiedit.runconfig import ModelConfig

    named = config_dir() / "model" / f"{model}.yaml"
    path = Path(model)
    if path.name == "config.json":
        path = path.parent
    if named.is_file():
        config = from_mapping(ModelConfig, yaml.safe_load(named.read_text()), "model")
    else:
        known = configured_model(model)
        config = ModelConfig(
            path.name, str(path) if path.is_dir() else model, known.get("modules"),
            known.get("dtype", "auto"),
        )  # fmt: skip
    changes = {"trust_remote_code": trust}
    changes |= {"modules": modules} if modules else {}
    changes |= {"dtype": dtype} if dtype else {}
    return dataclasses.replace(config, **changes)


def _show(facts, method: str, p) -> None:
    m = p.machines
    kind = "GPUs" if m.gpu else "ranks on the CPU"
    typer.echo(
        f"{facts.name}: {facts.parameters / 1e9:.2f}e9 parameters of {facts.bytes} bytes, "
        f"{len(facts.editable)} editable modules from layer {facts.first} of {facts.layers}; "
        f"{method}, back_depth {p.back_depth}; {m.devices} {kind} on {m.hosts} host(s)"
        + (", weights offloaded" if m.offload else "")
    )
    rows = []
    for place, parts, need, have in (
        ("each device", p.device, p.need_device, m.memory if m.gpu else None),
        ("each host", p.host, p.need_host, m.host_memory),
    ):
        rows += [[place, part, size(count)] for part, count in parts.items()]
        rows.append([place, "at the peak", size(need) + (f" of {size(have)}" if have else "")])
    typer.echo(table(["where", "what", "bytes"], rows, numbers=[2]))
