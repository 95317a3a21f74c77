"""`fedloom evaluate`: how good a run or a model is, on questions, records and conversations of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from core_training.foundation.strict_json import strict_json
from fedloom.console import results_only_on_stdout
from fedloom.options import Base, Json, Quiet, Site

app = typer.Typer()


@app.command()
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="RUN|MODEL...", help="Run folders, exported folders, base models.", show_default=False),
    ],
    on: Annotated[
        list[str],
        typer.Option("--on", metavar="FILE|TASK.yaml", help="What to evaluate on; may be given several times."),
    ],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Folder of answers, results and report.")
    ] = None,
    base: Base = None,
    site: Site = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate models."""
    from evaluation.running import Settings, documents
    from evaluation.running import evaluate as carry_out
    from evaluation.tasks import load_task

    tasks = [load_task(one) for one in on]
    with results_only_on_stdout():
        found = carry_out(models, tasks, Settings(base=base, site=site), to or Path("evaluations"), lambda *_: None)
    if as_json:
        typer.echo(strict_json({"results": documents(found)}))
