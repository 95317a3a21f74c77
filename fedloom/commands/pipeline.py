"""`fedloom pipeline`: named steps that start from each other, each done once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.options import Json, Quiet, print_answer

if TYPE_CHECKING:
    from experiments.carrying_out import Carried, StepOutcome
    from experiments.pipeline import PlannedStep
    from experiments.running import OnProgress

app = typer.Typer()


@app.command()
def pipeline(
    file: Annotated[Path, typer.Argument(metavar="PIPELINE", help="The pipeline's file (YAML).", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of the steps, in place of the file's output.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="STEP", help="Do this step and those after it anew; take those before as they are."
        ),
    ] = None,
    only: Annotated[str | None, typer.Option("--only", metavar="STEP", help="Do this one step, anew.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Do the steps of a pipeline that are not done, or whose recipe, data, base or earlier steps have changed.

    Whatever ended it, the same command goes on.
    """
    from experiments.carrying_out import carry_out, plan
    from experiments.pipeline import load_pipeline

    loaded = load_pipeline(file, out)
    if dry_run:
        _show(plan(loaded, start=start, only=only), None, as_json=as_json, quiet=quiet)
        return
    from fedloom.console import results_only_on_stdout, stderr, ticking
    from fedloom.pipeline_page import write_page
    from fedloom.step_figures import write_step_report

    @contextmanager
    def watch(planned: PlannedStep) -> Iterator[OnProgress]:
        with ticking(f"{planned.name} ({planned.step.what})", "step", quiet=quiet or as_json) as ticker:
            yield ticker.advance

    with results_only_on_stdout():
        carried: Carried = carry_out(loaded, watch, start=start, only=only, on_found=write_step_report)
        report = loaded.folder / "report.html"
        write_page(loaded, carried.outcomes, report)
    _show(carried.outcomes, report, as_json=as_json, quiet=quiet)
    if carried.ended_by is not None:
        raise carried.ended_by
    if not quiet and not as_json:
        stderr.print(f"wrote {report}", soft_wrap=True)


def _show(outcomes: list[StepOutcome], report: Path | None, *, as_json: bool, quiet: bool) -> None:
    """The steps as a table for people, or as one JSON object."""
    if as_json:
        document = {"steps": [outcome.document() for outcome in outcomes]}
        print_answer(document | ({} if report is None else {"report": str(report)}), "", as_json=True)
        return
    if quiet:
        return
    from rich.table import Table

    from core_training.foundation.foreign_text import printable
    from fedloom.console import stderr

    table = Table()
    for column in ("step", "what", "", "run", "gates", "why"):
        table.add_column(column, overflow="fold")
    for one in outcomes:
        gates = ", ".join(gate.short for gate in one.gates)
        why = "" if one.status == "failed" else one.why  # which the error says at the end
        table.add_row(*map(printable, (one.name, one.what, one.status, str(one.run), gates, why)))
    stderr.print(table)
