"""`fedloom server`: make a federation, admit sites, run the server, submit recipes. Parses, calls, prints."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from server.run_progress import RunProgress

app = typer.Typer(no_args_is_help=True, help="The federation server: Flower's SuperLink and fedloom's round loop.")

Folder = Annotated[Path, typer.Option(help="The federation folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def init(
    folder: Folder = Path("federation"),
    host: Annotated[str, typer.Option(help="Address to listen on; 127.0.0.1 is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 9092,
    name: Annotated[
        list[str] | None, typer.Option(help="Another host name or address that sites dial; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a federation: certificate authority, server certificate, folder."""
    from security.certificates import AUTHORITY_CERTIFICATE
    from server.deployment import init_federation
    from server.federation import Address

    federation = init_federation(folder, Address(host=host, port=port), name or [])
    authority = federation.keys / AUTHORITY_CERTIFICATE
    address = (name or [host])[0]
    _print(
        {"folder": str(federation.folder), "authority": str(authority), "server": f"{address}:{port}"},
        as_json,
        f"The federation is in {federation.folder}. Each site needs\n"
        f"  the certificate  {authority}\n"
        f"  the address      {address}:{port}\n"
        f"and makes its keys with\n"
        f"  fedloom client init --name NAME --server {address}:{port} --ca ca.crt --data NAME=PATH --model NAME=PATH\n"
        f"Then: fedloom server start --folder {folder}",
    )


@app.command()
def admit(
    name: Annotated[str, typer.Argument(help="The site's name.")],
    public_key: Annotated[Path, typer.Argument(help="The site's public key file, node.pub.")],
    folder: Folder = Path("federation"),
    as_json: AsJson = False,
) -> None:
    """Put a site on the roster: its key, and none but admitted keys, may join."""
    from server.deployment import admit_site
    from server.federation import open_federation

    site = admit_site(open_federation(folder), name, public_key)
    when = "may join now" if site.node_id is not None else "may join when the server is started"
    _print({"name": site.name, "node_id": site.node_id}, as_json, f"{site.name} {when}.")


@app.command()
def start(
    folder: Folder = Path("federation"),
    foreground: Annotated[bool, typer.Option(help="Stay, and stop the server when this command is stopped.")] = False,
    as_json: AsJson = False,
) -> None:
    """Start the server, and go on with all runs that are not finished."""
    from server.deployment import start_server, stop_server
    from server.federation import open_federation

    federation = open_federation(folder)
    superlink, resumed = start_server(federation)
    said = f"The server listens on {federation.address}." if superlink else "The server was running already."
    if resumed:
        said += f" Going on with {', '.join(resumed)}."
    _print({"address": str(federation.address), "started": superlink is not None, "resumed": resumed}, as_json, said)
    if foreground and superlink is not None:
        try:
            superlink.wait()
        finally:
            stop_server(federation)


@app.command()
def stop(folder: Folder = Path("federation"), as_json: AsJson = False) -> None:
    """Stop the server. The next start goes on with the runs."""
    from server.deployment import stop_server
    from server.federation import open_federation

    stopped = stop_server(open_federation(folder))
    _print({"stopped": stopped}, as_json, "The server is stopped." if stopped else "The server was not running.")


@app.command()
def submit(
    recipe: Annotated[Path, typer.Argument(help="The recipe; its topology is federated.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")] = None,
    folder: Folder = Path("federation"),
    wait: Annotated[bool, typer.Option(help="Follow the run to its end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Start a run over the federation's sites."""
    from core_training.errors import RunError
    from server.deployment import submit_run
    from server.federation import open_federation
    from server.run_progress import follow

    federation = open_federation(folder)
    run_id = submit_run(federation, recipe, overrides or [])
    run_folder = federation.runs / run_id
    if not wait:
        said = f"Run {run_id} is submitted; `fedloom server status --folder {folder}` follows it."
        _print({"run_id": run_id, "folder": str(run_folder)}, as_json, said)
        return
    summary = follow(run_folder, _print_event)
    if not summary:
        raise RunError(f"run {run_id} failed; `fedloom server start --folder {folder}` goes on from its last commit")
    _print(
        {"run_id": run_id, "folder": str(run_folder), "summary": summary},
        as_json,
        f"Run {run_id} is finished: held-out loss {_figure(summary['eval_loss_initial'])} -> "
        f"{_figure(summary['eval_loss'])}. The result is in {run_folder}.",
    )


@app.command()
def status(folder: Folder = Path("federation"), as_json: AsJson = False) -> None:
    """Show the sites and the runs: round, losses, what stands in the way."""
    from server.deployment import site_states
    from server.federation import open_federation
    from server.run_progress import read_progress

    federation = open_federation(folder)
    states = site_states(federation)
    runs = [read_progress(federation.runs / run_id) for run_id in federation.run_ids()]
    if as_json:
        running = states is not None
        _print({"running": running, "sites": states or {}, "runs": [asdict(run) for run in runs]}, True, "")
        return
    _print_tables(str(federation.address), states, [site.name for site in federation.sites()], runs)


def _print_tables(address: str, states: dict[str, str] | None, names: list[str], runs: list[RunProgress]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"The server listens on {address}." if states is not None else "The server is not running.")
    sites = Table("site", "state")
    for name in names:
        sites.add_row(name, (states or {}).get(name, "unknown"))
    console.print(sites)
    table = Table("run", "round", "loss", "held-out loss", "sites in the newest round", "note")
    for run in runs:
        present = {name: site for name, site in run.sites.items() if site.round == run.round}
        newest = ", ".join(f"{name} {_figure(site.loss)}" for name, site in present.items())
        note = "finished" if run.finished else run.note or ""
        table.add_row(run.run_id, f"{run.round}/{run.rounds}", _figure(run.loss), _figure(run.eval_loss), newest, note)
    console.print(table)


def _print_event(event: dict[str, Any]) -> None:
    if event["event"] == "round":
        line = f"round {event['round']}: loss {_figure(event['loss'])}, "
        line += f"{len(event['sites'])} sites, {event['seconds']:.1f} s"
    elif event["event"] in ("joined", "quarantined", "late", "failed", "waiting"):
        details = {key: value for key, value in event.items() if key not in ("time", "event")}
        line = f"{event['event']}: " + ", ".join(f"{key} {value}" for key, value in details.items())
    else:
        return
    typer.echo(line, err=True)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _print(document: dict[str, Any], as_json: bool, text: str) -> None:
    typer.echo(json.dumps(document) if as_json else text)
