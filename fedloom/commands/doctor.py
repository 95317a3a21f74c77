"""`fedloom doctor`: what this machine has and lacks, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict

import typer

from core_training.foundation.strict_json import strict_json
from fedloom.console import results_only_on_stdout
from fedloom.machine import State, examine
from fedloom.options import Json

app = typer.Typer()


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine has and lacks, and what to do about it. Exits 1 where the indispensable is missing."""
    from rich.table import Table
    from rich.text import Text

    from fedloom.console import console

    with results_only_on_stdout():
        findings = examine()
    ready = all(finding.state is not State.MISSING for finding in findings)
    if as_json:
        typer.echo(strict_json({"ready": ready, "findings": [asdict(finding) for finding in findings]}))
    else:
        colours = {State.OK: "green", State.OPTIONAL: "yellow", State.MISSING: "red"}
        table = Table(title="This machine", title_justify="left")
        for column in ("", "state", "found", "what to do"):
            table.add_column(column, overflow="fold")
        for finding in findings:
            state = Text(finding.state, style=colours[finding.state])
            table.add_row(finding.name, state, finding.found, finding.remedy or "")
        out = console()
        out.print(table)
        out.print("fedloom can run here." if ready else "fedloom cannot run here before what is missing is there.")
    raise typer.Exit(0 if ready else 1)
