"""`fedloom p2p`: make a gossip node, sign a roster, take part in a run, see how it goes. Parses, calls, prints."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from core_training.runs import events
from fedloom.options import Json, Overrides, Quiet, RecipePath, models_by_name, paths_by_name, print_answer

app = typer.Typer(no_args_is_help=True, help="A gossip node: training together without a server.")

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


@app.command()
def start(
    recipe: RecipePath,
    roster: Annotated[Path, typer.Option(help="The signed roster.")],
    overrides: Overrides = None,
    folder: Folder = Path("node"),
    founder: Annotated[
        str | None, typer.Option(help="The founder's public key; needed at the first start, and kept from then on.")
    ] = None,
    run_name: Annotated[str, typer.Option(help="Tells runs of one recipe apart; the same at every node.")] = "gossip",
    linger: Annotated[float, typer.Option(help="Seconds to stay at the end for nodes that are late.")] = 30.0,
    detach: Annotated[bool, typer.Option(help="Go on without this terminal; output goes to logs/node.log.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take part in a run until it ends. Started again after a kill, the node goes on with the others."""
    from core_training.recipe.reading import load_recipe
    from p2p.deployment import NodeRun, run_node, start_in_background

    loaded = load_recipe(recipe, ["topology.kind=gossip", *(overrides or [])])
    if detach:
        command = [sys.executable, "-m", "fedloom.cli", *(word for word in sys.argv[1:] if word != "--detach")]
        process = start_in_background(folder, command)
        print_answer(
            {"process": process},
            f"The node runs as process {process}; see: fedloom p2p status --folder {folder}",
            as_json=as_json,
        )
        return
    from fedloom.console import show_summary, ticking, warn
    from p2p.ledger import summarize
    from p2p.worker_link import worker_of

    if loaded.training.report_to and not quiet:
        warn(["training.report_to: a gossip node reports nothing; its curve is in its run folder"])
    with ticking("gossip", "round", quiet=quiet or as_json) as ticker:

        def listener(event: events.Event) -> None:
            match event:
                case events.NodeRound():
                    words = f"loss {event.loss:.4f}, mean over {', '.join(event.contributors)}"
                    ticker.advance(event.round, event.of, words)
                case events.Adopted():
                    ticker.advance(event.round, event.of, f"caught up, state from {', '.join(event.donors)}")
                case _ if isinstance(event, _SHOWN) and not quiet:
                    typer.echo(_told(event), err=True)

        result = run_node(NodeRun(folder, roster, loaded, founder, run_name, linger), worker_of, listener)
    show_summary(asdict(summarize(loaded, [result])), str(folder / "runs"), as_json=as_json, quiet=quiet)


@app.command()
def status(folder: Folder = Path("node"), as_json: Json = False) -> None:
    """Show how far the node is, who else is there, and the losses so far."""
    from p2p.deployment import node_status

    now = node_status(folder)
    lines = [f"{now.name}: {now.state}" + (f" (process {now.process})" if now.process else "")]
    if now.run_id:
        lines.append(f"  run {now.run_id}: round {now.round}/{now.rounds}, live peers: {', '.join(now.live) or 'none'}")
    lines += [
        f"  loss {loss:.4f}" + (f", held out {held_out:.4f}" if held_out is not None else "")
        for loss, held_out in list(zip(now.losses, now.eval_losses, strict=True))[-1:]
    ]
    print_answer(now.to_json(), "\n".join(lines), as_json=as_json)


@app.command()
def stop(folder: Folder = Path("node"), as_json: Json = False) -> None:
    """Stop the node. The others go on without it; it can come back."""
    from p2p.deployment import stop_node

    stopped = stop_node(folder)
    print_answer(
        {"stopped": stopped}, "The node is stopped." if stopped else "The node was not running.", as_json=as_json
    )


_SHOWN = (
    events.WaitingForPeers,
    events.PeerUp,
    events.PeerDown,
    events.PeerRefused,
    events.Refused,
    events.TooFewMembers,
    events.StoppedEarly,
    events.BestChosen,
)
"""The events that a terminal shows besides rounds."""


def _told(event: events.Event) -> str:
    """An event in one line: what happened, then its fields."""
    fields = {key: value for key, value in asdict(event).items() if value is not None}
    if not fields.get("untold"):
        fields.pop("untold", None)
    return f"{event.NAME}: {', '.join(f'{key} {value}' for key, value in fields.items())}"
