"""`fedloom report`: curves and tables of runs that are there, running and failed ones too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from core_training.foundation.strict_json import strict_json
from fedloom.console import stderr
from fedloom.options import Json, Quiet

app = typer.Typer()


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.", show_default=False)],
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="FILE", help="The file to write: .html, .svg or .png. Unset: RUN/report.html."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw the curves of runs, in one picture, with tables of what is known of them and where they differ."""
    from fedloom.curves_page import write_curves
    from fedloom.run_curves import read_runs

    target = to or runs[0] / "report.html"
    read = read_runs(runs)
    write_curves(read, target)
    if as_json:
        known = [
            {"run": str(path), "state": one.state, "steps": one.steps} for path, one in zip(runs, read, strict=True)
        ]
        typer.echo(strict_json({"report": str(target), "runs": known}))
    elif not quiet:
        stderr.print(f"wrote {target}", soft_wrap=True)
