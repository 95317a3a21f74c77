"""`fedloom server`: make a federation, admit sites, run the server, submit recipes. Parses, calls, prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from core_training.foundation.foreign_text import printable
from fedloom.foreground import attended
from fedloom.options import Json, Overrides, Quiet, RecipePath, print_answer

if TYPE_CHECKING:
    from server.evaluation_requests import Request
    from server.federation import Federation
    from server.run_progress import RunProgress
    from server.server_status import ServerStatus

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="The federation server: Flower's SuperLink and fedloom's round loop.",
)

_TAKEN_UP_WITHIN = 60.0
"""Seconds within which somebody works on a run whose result is asked about."""

Folder = Annotated[Path, typer.Option(help="The federation folder.")]


@app.command()
def init(
    folder: Folder = Path("federation"),
    host: Annotated[str, typer.Option(help="Address to listen on; 127.0.0.1 is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 9092,
    name: Annotated[
        list[str] | None, typer.Option(help="Another host name or address that sites dial; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a federation: certificate authority, server certificate, folder."""
    from security.certificates import AUTHORITY_CERTIFICATE
    from server.deployment import init_federation
    from server.federation import Address

    federation = init_federation(folder, Address(host=host, port=port), name or [])
    authority = federation.keys / AUTHORITY_CERTIFICATE
    address = (name or [host])[0]
    print_answer(
        {"folder": str(federation.folder), "authority": str(authority), "server": f"{address}:{port}"},
        f"The federation is in {federation.folder}. Each site needs\n"
        f"  the certificate  {authority}\n"
        f"  the address      {address}:{port}\n"
        f"and makes its keys with\n"
        f"  fedloom client init --name NAME --server {address}:{port} --ca ca.crt --data NAME=PATH --model NAME=PATH\n"
        f"Then: fedloom server start --folder {folder}",
        as_json=as_json,
    )


@app.command()
def admit(
    name: Annotated[str, typer.Argument(help="The site's name.")],
    public_key: Annotated[Path, typer.Argument(help="The site's public keys, node.pub: two lines.")],
    folder: Folder = Path("federation"),
    as_json: Json = False,
) -> None:
    """Put a site on the list: its key, and none but admitted keys, may join.

    The second line of node.pub is the site's identity: runs with secure aggregation need it.

    A site that was admitted without it can be admitted once more.
    """
    from server.deployment import admit_site
    from server.federation import open_federation

    site = admit_site(open_federation(folder), name, public_key)
    when = "may join now" if site.node_id is not None else "may join when the server is started"
    lacks = "" if site.identity else " Its file holds no identity: it takes no part in runs with secure aggregation."
    document = {"name": site.name, "node_id": site.node_id, "identity": site.identity}
    print_answer(document, f"{site.name} {when}.{lacks}", as_json=as_json)


@app.command()
def roster(
    out: Annotated[Path, typer.Option(help="The roster to write.")] = Path("roster.json"),
    folder: Folder = Path("federation"),
    as_json: Json = False,
) -> None:
    """Write the roster of the sites' identities, which every site pins before runs with secure aggregation.

    With it a site knows the other sites' keys without having to trust this server.

    Hand the same file to all sites, and a new one to all when one more was admitted.
    """
    from security.identities import roster_digest, to_read_out
    from server.federation import open_federation

    federation = open_federation(folder)
    identities = federation.hand_out_roster(out)
    lacking = [site.name for site in federation.sites() if site.identity is None]
    digest = roster_digest(identities)
    missing = f"Not in it, for want of an identity: {', '.join(lacking)}.\n" if lacking else ""
    print_answer(
        {"roster": str(out), "sites": list(identities), "without_identity": lacking, "digest": digest},
        f"{out} names {', '.join(identities)}. Hand it to every site, which keeps it with\n"
        f"  fedloom client pin {out.name}\n"
        f"{missing}"
        f"The sites compare its digest with each other, by phone:\n"
        f"  {to_read_out(digest)}",
        as_json=as_json,
    )


@app.command()
def start(
    folder: Folder = Path("federation"),
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay, and stop the server when this command is stopped.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Start the server, and go on with all runs that are not finished."""
    from core_training.foundation.stopping import saying
    from server.deployment import start_server, stop_server
    from server.federation import open_federation

    federation = open_federation(folder)
    left = f"interrupted; `fedloom server stop --folder {folder}` ends what runs"
    with saying(lambda: left):
        superlink, resumed = start_server(federation)
    said = f"The server listens on {federation.address}." if superlink else "The server was running already."
    if resumed:
        said += f" Going on with {', '.join(resumed)}."
    print_answer(
        {"address": str(federation.address), "started": superlink is not None, "resumed": resumed},
        said,
        as_json=as_json,
    )
    if foreground and superlink is not None:
        with saying(lambda: left):
            attended(superlink, lambda: stop_server(federation), "server", f"--folder {folder}")


@app.command()
def stop(folder: Folder = Path("federation"), as_json: Json = False) -> None:
    """Stop the server. The next start goes on with the runs."""
    from server.deployment import stop_server
    from server.federation import open_federation

    stopped = stop_server(open_federation(folder))
    print_answer(
        {"stopped": stopped}, "The server is stopped." if stopped else "The server was not running.", as_json=as_json
    )


@app.command()
def submit(
    recipe: RecipePath,
    overrides: Overrides = None,
    folder: Folder = Path("federation"),
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run to its end.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Start a run over the federation's sites; the recipe's topology is federated.

    With `privacy.secure_aggregation: true` the server sees sums of updates only.

    Before the first such run every site pins the roster that `fedloom server roster` writes.
    """
    from core_training.foundation.stopping import saying
    from server.deployment import submit_run
    from server.federation import open_federation

    federation = open_federation(folder)
    run_id = submit_run(federation, recipe, overrides or [])
    if wait:
        said = (
            f"run {run_id} is not followed any more and goes on; `fedloom server status --folder {folder}` tells of it"
        )
        with saying(lambda: said):
            _follow(federation, run_id, as_json=as_json, quiet=quiet)
        return
    said = f"Run {run_id} is submitted; `fedloom server status --folder {folder}` follows it."
    print_answer({"run_id": run_id, "folder": str(federation.run_folder(run_id))}, said, as_json=as_json)


@app.command()
def status(folder: Folder = Path("federation"), as_json: Json = False) -> None:
    """Show the sites and the runs: round, losses, what stands in the way.

    Exits 0 where all is well, 3 where something needs a person, and says what, 4 where the server is not running.
    """
    from server.federation import open_federation
    from server.server_status import server_status

    federation = open_federation(folder)
    now = server_status(federation)
    if as_json:
        print_answer(now.to_json(), "", as_json=True)
    else:
        _print_tables(str(federation.address), now)
    raise typer.Exit(now.health)


@app.command()
def rewind(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="The run, as `fedloom server status` names it.")],
    to: Annotated[int, typer.Option(min=0, help="The round at whose end the run is to stand; 0 is its start.")],
    without: Annotated[
        list[str] | None, typer.Option(help="A site that takes no part in the run from there on; may be repeated.")
    ] = None,
    folder: Folder = Path("federation"),
    as_json: Json = False,
) -> None:
    """Take a run back to an earlier round, and go on from there.

    What came after that round is removed, a result that was written included.

    A site that poisoned a round would send the same again: leave it out with --without.

    The recipe's topology.keep_rounds says how far back a run can be taken.
    """
    from server.deployment import rewind_run
    from server.federation import open_federation

    federation = open_federation(folder)
    goes_on = rewind_run(federation, run_id, to, without or [])
    then = " and goes on" if goes_on else f"; `fedloom server start --folder {folder}` goes on with it"
    print_answer(
        {"run_id": run_id, "round": to, "without": without or [], "goes_on": goes_on},
        f"Run {run_id} stands at the end of round {to}{then}.",
        as_json=as_json,
    )


@app.command()
def evaluate(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A finished run, as `fedloom server status` names it.")],
    on: Annotated[
        str,
        typer.Option(
            "--on",
            metavar="NAME",
            help="The data set's name in the sites' site.yaml; held-out is what the run held out at each.",
        ),
    ],
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metrics", metavar="NAME,…", help="What is measured. Unset: loss, perplexity, token_accuracy."),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option("--labels", metavar="NAME,…", help="All labels of the choices: for macro_f1 and the table."),
    ] = None,
    resamples: Annotated[int, typer.Option(min=0, max=2000, help="Of the bootstrap, for intervals.")] = 500,
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, help="The longest answer, in tokens.")] = 256,
    folder: Folder = Path("federation"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Have every site judge a finished run's result on its own records; only sums come back.

    Where the run aggregates securely the sums are masked: the server sees the sum over the sites alone.

    Each site's site.yaml says what it answers, and whether its own figures may be told (evaluation).
    """
    from core_training.foundation.stopping import saying
    from fedloom.console import stderr, ticking
    from server.deployment import evaluate_run
    from server.evaluation_requests import RESULTS, Request
    from server.federation import open_federation

    federation = open_federation(folder)
    request = Request.of(
        data=on,
        metrics=_listed(metrics) or ["loss", "perplexity", "token_accuracy"],
        labels=_listed(labels),
        resamples=resamples,
        max_tokens=max_tokens,
    )
    place = evaluate_run(federation, run_id, request)
    said = f"the evaluation is not waited for any more and goes on; its figures will be in {place / RESULTS}"
    with saying(lambda: said), ticking(f"{run_id}: {on}", "evaluation", quiet=quiet or as_json):
        document = _await_figures(federation, run_id, request)
    result = document["results"][0]
    for site, reason in result["missing"].items():
        stderr.print(printable(f"{site} is not in it: {reason}"), soft_wrap=True)
    if as_json or quiet:
        print_answer(document, "", as_json=as_json)
        return
    _print_figures(result)
    stderr.print(printable(f"wrote {place / RESULTS}"), soft_wrap=True)


def _listed(names: list[str] | None) -> list[str]:
    return [name for one in names or [] for part in one.split(",") if (name := part.strip())]


def _await_figures(federation: Federation, run_id: str, request: Request) -> dict[str, Any]:
    """The figures of a request, once they are there. Raises RunError where the sites could give none."""
    import time

    from core_training.foundation.errors import RunError
    from core_training.runs import events
    from core_training.runs.run_folder import RunFolder
    from server.deployment import is_worked_on
    from server.evaluation_requests import is_pending, results

    run, data = federation.run_folder(run_id), request.data
    abandoned = time.monotonic() + _TAKEN_UP_WITHIN
    while is_pending(run, data):
        if is_worked_on(federation, run_id):
            abandoned = time.monotonic() + _TAKEN_UP_WITHIN
        elif time.monotonic() > abandoned:
            raise RunError(
                f"nobody works on run {run_id}; `fedloom server start --folder {federation.folder}` goes on with it"
            )
        time.sleep(0.2)
    if (document := results(run, request)) is None:
        failed = [one.reason for one in RunFolder(run).events(events.EvaluationFailed) if one.data == data]
        raise RunError(f"run {run_id} could not be evaluated on '{data}': {failed[-1] if failed else 'no reason told'}")
    return document


def _print_figures(result: dict[str, Any]) -> None:
    from rich.table import Table

    from fedloom.console import console

    shown = Table(title=printable(f"{result['task']} · {result['n']} items"), title_justify="left")
    sites = result["groups"].get("site", {})
    for column in ("", f"{len(result['sites'])} sites", *sites):
        shown.add_column(printable(column), justify="right" if column else "left", overflow="fold")
    for name, figure in result["metrics"].items():
        own = [site["metrics"].get(name) for site in sites.values()]
        shown.add_row(name, _with_ends(figure), *map(_with_ends, own))
    console().print(shown)


def _with_ends(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "-"
    if figure["low"] is None or figure["low"] != figure["low"]:
        return _figure(figure["value"])
    return f"{figure['value']:.4f} ({figure['low']:.4f} … {figure['high']:.4f})"


def _print_tables(address: str, now: ServerStatus) -> None:
    from rich.table import Table

    from fedloom.console import console

    out = console()
    out.print(f"The server listens on {address}." if now.running else "The server is not running.")
    sites = Table()
    runs = Table()
    for table, columns in ((sites, _SITE_COLUMNS), (runs, _RUN_COLUMNS)):
        for column in columns:
            table.add_column(column, overflow="fold")
    for name, state in now.sites.items():
        sites.add_row(name, state)
    for run in now.runs:
        runs.add_row(*_row(run))
    out.print(sites)
    out.print(runs)
    ends = ", ".join(f"{name} until {day}" for name, day in now.certificates.items())
    out.print(f"certificates: {ends}", soft_wrap=True)
    for what in now.attention:
        out.print(printable(what), soft_wrap=True)
    for run in now.runs:
        if run.note and not run.finished and not any(what.startswith(f"{run.run_id}: ") for what in now.attention):
            out.print(f"{run.run_id}: {printable(run.note)}", soft_wrap=True)


_SITE_COLUMNS = ("site", "state")
_RUN_COLUMNS = ("run", "round", "loss", "held-out loss", "sites in the newest round", "state")


def _row(run: RunProgress) -> tuple[str, ...]:
    present = {name: site for name, site in sorted(run.sites.items()) if site.round == run.round}
    # A site's own loss is not known where it is masked.
    newest = ", ".join(f"{name} {site.loss:.4f}" if site.loss is not None else name for name, site in present.items())
    void = f", {run.void_rounds} void" if run.void_rounds else ""
    finished = ", finished" if run.finished else ""
    stands = f"{run.rounds_done}/{run.rounds}{void}{finished}"
    return run.run_id, stands, _figure(run.loss), _figure(run.eval_loss), newest, run.state


def _follow(federation: Federation, run_id: str, *, as_json: bool, quiet: bool) -> None:
    from core_training.foundation.errors import RunError
    from core_training.runs.events import Event, Failed, Round
    from fedloom.console import show_summary, stderr, ticking
    from server.deployment import is_worked_on
    from server.run_progress import follow, read_progress

    folder = federation.run_folder(run_id)
    rounds = read_progress(folder).rounds
    failures: list[str] = []
    with ticking(run_id, "round", quiet=quiet or as_json) as ticker:

        def report(event: Event) -> None:
            if isinstance(event, Failed) and quiet:  # else it is shown as it happens
                failures.append(f": {event.reason}")
            if isinstance(event, Round):
                done = event.rounds_done or event.round
                ticker.advance(done, rounds, f"loss {_figure(event.loss)}, {len(event.sites)} sites")
            elif event.note is not None and not quiet:
                stderr.print(printable(event.note), soft_wrap=True)

        summary = follow(folder, report, lambda: is_worked_on(federation, run_id))
    if not summary:
        raise RunError(
            f"run {run_id} stands still and nobody works on it{''.join(failures)}; "
            f"`fedloom server start --folder {federation.folder}` goes on with it"
        )
    show_summary(summary, str(folder), as_json=as_json, quiet=quiet)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
