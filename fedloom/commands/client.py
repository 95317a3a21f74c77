"""`fedloom client`: make a site of a federation, start and stop it, see how it is. Parses, calls, prints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fedloom.foreground import attended
from fedloom.options import Json, models_by_name, paths_by_name, print_answer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="A site of a federation: Flower's SuperNode and the resident worker.",
)

Folder = Annotated[Path, typer.Option(help="The site's folder.")]


@app.command()
def init(
    name: Annotated[str, typer.Option(help="The site's name, as the server's operator will know it.")],
    server: Annotated[str, typer.Option(help="The server's HOST:PORT.")],
    ca: Annotated[Path, typer.Option(help="The federation's ca.crt, from the server's operator.")],
    data: Annotated[
        list[str], typer.Option(metavar="NAME=PATH", help="A data set's name in recipes, its files here; repeatable.")
    ],
    model: Annotated[
        list[str],
        typer.Option(metavar="NAME=PATH", help="A model's name in recipes, its folder or hub name; repeatable."),
    ],
    folder: Folder = Path("site"),
    as_json: Json = False,
) -> None:
    """Make a site's folder, its keys and its identity. What is private never leaves the folder."""
    from client.deployment import init_site

    models = models_by_name(model, "--model")
    public_key = init_site(folder, name, server, paths_by_name(data, "--data"), models, ca)
    print_answer(
        {"folder": str(folder), "public_key": str(public_key)},
        f"The site is in {folder}. Hand this file, and no other, to the server's operator:\n"
        f"  {public_key}\n"
        f"who admits the site with\n"
        f"  fedloom server admit {name} node.pub\n"
        f"Then: fedloom client start --folder {folder}",
        as_json=as_json,
    )


@app.command()
def pin(
    roster: Annotated[Path, typer.Argument(help="The roster, from the server's operator (`fedloom server roster`).")],
    folder: Folder = Path("site"),
    replace: Annotated[bool, typer.Option("--replace", help="Pin it in the place of another one.")] = False,
    as_json: Json = False,
) -> None:
    """Keep the roster of the sites' identities, which runs with secure aggregation need.

    From then on this site hides its updates with these sites and no others, whatever the server says.

    So compare the digest with the other sites by phone: it is the same at all, and every name is a site that you know.
    """
    from client.pinned_roster import ROSTER_FILE, pin_roster
    from security.identities import to_read_out

    pinned = pin_roster(folder, roster, replace=replace)
    names = list(pinned.identities)
    print_answer(
        {"roster": str(folder / ROSTER_FILE), "sites": names, "digest": pinned.digest},
        f"Pinned: {len(names)} sites, and this one is among them with its own key: {', '.join(names)}.\n"
        f"Ring up the other sites. Each must read out this digest, and every name must be a site that you know:\n"
        f"  {to_read_out(pinned.digest)}\n"
        f"A site that is running takes the roster up when it is stopped and started.",
        as_json=as_json,
    )


@app.command()
def start(
    folder: Folder = Path("site"),
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay, and stop the site when this command is stopped.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Start the site: it connects to the server and takes part in its runs."""
    from client.deployment import start_site, stop_site
    from core_training.foundation.stopping import saying

    left = f"interrupted; `fedloom client stop --folder {folder}` ends what runs"
    with saying(lambda: left):
        supervisor, link = start_site(folder)
    reasons = "" if link.state == "connected" else _reasons(folder)
    said = {
        "connected": "The site is connected.",
        "connecting": f"The server cannot be reached yet; the site keeps trying.{reasons}",
        "refused": f"The server has not taken the site in yet ({link.detail}); the site keeps trying.{reasons}",
    }[link.state]
    print_answer({"link": link.state, "node_id": link.node_id}, said, as_json=as_json)
    if foreground:
        with saying(lambda: left):
            attended(supervisor, lambda: stop_site(folder), "client", f"--folder {folder}")


@app.command()
def stop(folder: Folder = Path("site"), as_json: Json = False) -> None:
    """Stop the site's processes. A run goes on without the site, and takes it in again when it is back."""
    from client.deployment import stop_site
    from client.site_config import load_site_config

    name = load_site_config(folder).name
    stopped = stop_site(folder)
    print_answer(
        {"stopped": stopped}, f"The site {name} {'is stopped' if stopped else 'was not running'}.", as_json=as_json
    )


@app.command()
def status(folder: Folder = Path("site"), as_json: Json = False) -> None:
    """Show the site's processes, its link to the server, the roster it pinned, and the newest events of its runs.

    Exits 0 where all is well, 3 where something needs a person, and says what, 4 where the site is stopped.
    """
    from client.site_status import site_status
    from security.identities import to_read_out

    now = site_status(folder)
    lines = [f"{now.name}: {now.link}" + (f" ({now.detail})" if now.detail else "")]
    lines += [f"  {process:10} {number or 'not running'}" for process, number in now.processes.items()]
    lines.append(f"  {'roster':10} {_roster(now.roster, to_read_out)}")
    if now.server is not None and now.server.clock_ahead is not None:
        lines.append(f"  {'clock':10} {now.server.clock_ahead:+.0f} s to the server's")
    lines += [f"  {name:10} valid until {day}" for name, day in now.certificates.items()]
    lines += [f"  run {run}: {_told(event)}" for run, event in now.runs.items()]
    lines += now.attention
    print_answer(now.to_json(), "\n".join(lines), as_json=as_json)
    raise typer.Exit(now.health)


def _reasons(folder: Path) -> str:
    """What stands between the site and its server, a line each."""
    from client.site_status import site_status

    return "".join(f"\n  {what}" for what in site_status(folder).attention)


def _roster(pinned: tuple[list[str], str] | None, to_read_out: Callable[[str], str]) -> str:
    return "none pinned" if pinned is None else f"{', '.join(pinned[0])}: {to_read_out(pinned[1])}"


def _told(event: dict[str, Any]) -> str:
    """An event in one line: what happened, then its figures."""
    figures = {key: value for key, value in event.items() if key not in ("time", "event") and value is not None}
    shown = (f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items())
    return ", ".join([event["event"], *shown])
