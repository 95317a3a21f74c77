"""`fedloom p2p`: make a gossip node, sign a roster, take part in a run, see how it goes. Parses, calls, prints."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.options import Json, Overrides, Quiet, RecipePath, as_file, models_by_name, paths_by_name, print_answer

app = typer.Typer(no_args_is_help=True, help="A gossip node: training together without a server.")

if TYPE_CHECKING:
    from p2p.deployment import NodeRun
    from p2p.ledger import NodeResult

Folder = Annotated[Path, typer.Option(help="The node's folder.")]


@app.command()
def init(
    name: Annotated[str, typer.Option(help="The node's name, as the others will know it.")],
    data: Annotated[
        list[str], typer.Option(metavar="NAME=PATH", help="A data set's name in recipes, its files here; repeatable.")
    ],
    model: Annotated[
        list[str],
        typer.Option(metavar="NAME=PATH", help="A model's name in recipes, its folder or hub name; repeatable."),
    ],
    listen: Annotated[str, typer.Option(help="HOST:PORT to listen on; 127.0.0.1 is this machine alone.")],
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT at which the others reach this node, if not where it listens.")
    ] = None,
    folder: Folder = Path("node"),
    as_json: Json = False,
) -> None:
    """Make a node's folder and its keys. The private key never leaves the folder."""
    from p2p.node_folder import init_node

    models = models_by_name(model, "--model")
    entry = init_node(folder, name, listen, paths_by_name(data, "--data"), models, address)
    print_answer(
        {"folder": str(folder), "entry": str(entry), **json.loads(entry.read_text(encoding="utf-8"))},
        f"The node is in {folder}. Hand this file, and no other, to the founder of the federation:\n"
        f"  {entry}\n"
        f"who puts all nodes into one roster with\n"
        f"  fedloom p2p roster NODE.json NODE.json … --out roster.json",
        as_json=as_json,
    )


@app.command()
def roster(
    entries: Annotated[list[Path], typer.Argument(metavar="NODE.json...", help="The nodes' entries.")],
    out: Annotated[Path, typer.Option(help="The roster to write.")] = Path("roster.json"),
    founder_key_folder: Annotated[
        Path, typer.Option(help="Where the founder's key is, or is made at the first use; it never leaves this folder.")
    ] = Path("founder"),
    as_json: Json = False,
) -> None:
    """Sign a roster of these nodes, as the founder of the federation."""
    from p2p.deployment import make_roster

    signed, public_key = make_roster(entries, founder_key_folder, out)
    print_answer(
        {"roster": str(out), "members": list(signed.names), "founder": public_key},
        f"{out} names {', '.join(signed.names)}. Hand it to every node, with the founder's public key:\n"
        f"  {public_key}\n"
        f"Then, at each node: fedloom p2p start --roster {out} --founder {public_key} RECIPE",
        as_json=as_json,
    )


RosterPath = Annotated[Path, typer.Option(help="The signed roster.")]
Founder = Annotated[
    str | None, typer.Option(help="The founder's public key; needed at the first start, and kept from then on.")
]
RunName = Annotated[str, typer.Option(help="Tells runs of one recipe apart; the same at every node.")]


@app.command()
def start(
    recipe: RecipePath,
    roster: RosterPath,
    overrides: Overrides = None,
    folder: Folder = Path("node"),
    founder: Founder = None,
    run_name: RunName = "gossip",
    linger: Annotated[
        float,
        typer.Option(help="Seconds to stay at the end and hand out the result, unless all have it sooner."),
    ] = 86_400.0,
    detach: Annotated[bool, typer.Option(help="Go on without this terminal; output goes to logs/node.log.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take part in a run until it ends. Started again after a kill, the node goes on with the others.

    A round for which too few nodes come together within topology.round_deadline is void; three in a row end the run.
    """
    from core_training.recipe.reading import load_recipe
    from p2p.deployment import NodeRun, start_in_background

    loaded = load_recipe(recipe, ["topology.kind=gossip", *(overrides or [])])
    if detach:
        with as_file(recipe, loaded) as arguments:
            command = [sys.executable, "-m", "fedloom.cli", *(word for word in arguments if word != "--detach")]
            process = start_in_background(folder, command)
        print_answer(
            {"process": process},
            f"The node runs as process {process}; see: fedloom p2p status --folder {folder}",
            as_json=as_json,
        )
        return
    _carry_out(NodeRun(folder, roster, loaded, founder, run_name, linger), as_json=as_json, quiet=quiet)


@app.command()
def fetch(
    recipe: RecipePath,
    roster: RosterPath,
    overrides: Overrides = None,
    folder: Folder = Path("node"),
    founder: Founder = None,
    run_name: RunName = "gossip",
    within: Annotated[float, typer.Option(help="Seconds within which somebody must hand it out.")] = 60.0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take the result of a run that others have finished, without training. They must still be there."""
    from core_training.recipe.reading import load_recipe
    from p2p.deployment import NodeRun

    loaded = load_recipe(recipe, ["topology.kind=gossip", *(overrides or [])])
    node_run = NodeRun(folder, roster, loaded, founder, run_name, fetch_within=within)
    _carry_out(node_run, as_json=as_json, quiet=quiet)


def _carry_out(node_run: NodeRun, *, as_json: bool, quiet: bool) -> None:
    from core_training.foundation.stopping import saying
    from fedloom.console import show_summary, ticking, warn
    from fedloom.node_terminal import terminal_listener
    from p2p.deployment import run_node
    from p2p.ledger import summarize
    from p2p.worker_link import worker_of

    recipe, folder = node_run.recipe, node_run.folder
    if recipe.training.report_to and not quiet:
        warn(["training.report_to: a gossip node reports nothing; its curve is in its run folder"])
    with ticking("gossip", "round", quiet=quiet or as_json) as ticker:
        listener = terminal_listener(ticker, quiet=quiet)

        def on_result(result: NodeResult) -> None:
            show_summary(asdict(summarize(recipe, [result])), str(folder / "runs"), as_json=as_json, quiet=quiet)

        with saying(lambda: "stopped; what was committed is kept, and the same command goes on from it"):
            run_node(node_run, worker_of, listener, on_result)


@app.command()
def status(folder: Folder = Path("node"), as_json: Json = False) -> None:
    """Show how far the node is, who else is there, and the losses so far.

    Exits 0 where all is well or the run has completed, 3 where something needs a person, 4 where the node does not run.
    """
    from p2p.deployment import node_status

    now = node_status(folder)
    lines = [f"{now.name}: {now.state}" + (f" (process {now.process})" if now.process else "")]
    if now.run_id:
        void = f", {now.void_rounds} void" if now.void_rounds else ""
        live = ", ".join(now.live) or "none"
        lines.append(f"  run {now.run_id}: round {now.rounds_done}/{now.rounds}{void}, live peers: {live}")
    if now.note and now.state != "completed":
        lines.append(f"  {now.note}")
    lines += [
        f"  loss {loss:.4f}" + (f", held out {held_out:.4f}" if held_out is not None else "")
        for loss, held_out in list(zip(now.losses, now.eval_losses, strict=True))[-1:]
        if loss is not None
    ]
    if now.certificate_ends is not None:
        lines.append(f"  certificate valid until {now.certificate_ends}")
    lines += now.attention
    print_answer(now.to_json(), "\n".join(lines), as_json=as_json)
    raise typer.Exit(now.health)


@app.command()
def stop(folder: Folder = Path("node"), as_json: Json = False) -> None:
    """Stop the node. The others go on without it; it can come back."""
    from p2p.deployment import stop_node

    stopped = stop_node(folder)
    print_answer(
        {"stopped": stopped}, "The node is stopped." if stopped else "The node was not running.", as_json=as_json
    )
