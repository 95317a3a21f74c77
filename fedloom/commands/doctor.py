"""`fedloom doctor`: what this machine has and lacks, and what to do about it."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from fedloom.console import results_only_on_stdout
from fedloom.machine import State, examine
from fedloom.options import Json

app = typer.Typer()


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine has and lacks, and what to do about it. Exits 1 where the indispensable is missing."""
    from rich.console import Console
    from rich.table import Table

    with results_only_on_stdout():
        findings = examine()
    ready = all(finding.state is not State.MISSING for finding in findings)
    if as_json:
        typer.echo(json.dumps({"ready": ready, "findings": [asdict(finding) for finding in findings]}))
    else:
        marks = {State.OK: "[green]ok[/]", State.OPTIONAL: "[yellow]optional[/]", State.MISSING: "[red]missing[/]"}
        table = Table(title="This machine", title_justify="left")
        for column in ("", "state", "found", "what to do"):
            table.add_column(column, overflow="fold")
        for finding in findings:
            table.add_row(finding.name, marks[finding.state], finding.found, finding.remedy or "")
        console = Console(highlight=False)
        console.print(table)
        console.print("fedloom can run here." if ready else "fedloom cannot run here before what is missing is there.")
    raise typer.Exit(0 if ready else 1)
