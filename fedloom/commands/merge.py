"""`fedloom merge`: several finished runs of one start as one, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import click
import typer

from core_training.foundation.errors import InputError
from fedloom.console import results_only_on_stdout, stderr
from fedloom.options import Base, Json, Quiet, print_answer

app = typer.Typer()

RULES = ("task_arithmetic", "ties", "dare", "dare_ties")


@app.command()
def merge(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="The run folders.", show_default=False)],
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="Run folder to write: new, or empty.", show_default=False)
    ],
    rule: Annotated[
        str,
        typer.Option(
            click_type=click.Choice(list(RULES)),
            help="How the runs' changes are put together: task_arithmetic is their weighted mean; ties keeps the "
            "largest of each and lets the sign that prevails decide; dare keeps some of each by lot.",
        ),
    ] = "task_arithmetic",
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,…", help="What each run weighs, relative to the others. Unset: alike.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Times the change that comes of it.")] = 1.0,
    density: Annotated[
        float | None, typer.Option(help="The share of each change that is kept. Unset: 0.2 for ties, 0.5 by lot.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what falls by lot.")] = 0,
    base: Base = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put several finished runs of one start together, without training, as a run that `export` and `chat` take.

    The runs must have started from the same: base model, earlier runs, tuning and training.seed.
    """
    from core_training.models.combination import Merge, merge_runs

    settings = Merge(rule, _numbers(weights), scale, density, seed)
    with results_only_on_stdout():
        summary = merge_runs(runs, to, settings, base)
    said = {"folder": str(to), "rule": rule, "runs": len(runs), "state_digest": summary.state_digest}
    if as_json:
        print_answer(said, "", as_json=True)
    elif not quiet:
        stderr.print(f"put {len(runs)} runs together by {rule}: {to}", soft_wrap=True)


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(number) for number in text.split(",")]
    except ValueError:
        raise InputError(f"--weights: '{text}' is not a list of numbers, such as 2,1,1") from None
