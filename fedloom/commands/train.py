"""`fedloom train`: central training from a recipe."""

from __future__ import annotations

from dataclasses import asdict

import typer

from core_training.foundation.foreign_text import printable
from fedloom.options import Json, Out, Overrides, Quiet, RecipePath, Resume, as_file

app = typer.Typer()


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train on this machine: one process, or a DeepSpeed group (deepspeed.processes)."""
    from pathlib import Path

    from core_training.distributed.launch import must_launch, opened_engine, run_as_group, speaks
    from core_training.foundation.stopping import saying
    from core_training.recipe.model_source import on_this_machine
    from core_training.recipe.reading import load_recipe
    from core_training.runs.run_folder import RunFolder
    from core_training.runs.trackers import check_trackers
    from fedloom.console import results_only_on_stdout, show_left_out, show_summary, stderr, ticking, warn
    from fedloom.recipe_account import warnings_of

    loaded = load_recipe(recipe, ["topology.kind=central", *(overrides or [])])
    folder = RunFolder(out or Path(loaded.output))
    loaded = folder.pinned(loaded) if resume else loaded
    launching = must_launch(loaded.deepspeed)
    if resume and (done := folder.completed(loaded)) is not None:
        if speaks():
            show_summary(done, str(folder.path), as_json=as_json, quiet=quiet)
        return
    check_trackers(loaded)
    folder.check_place()
    if speaks():  # the others of a group are given its recipe
        loaded = on_this_machine(loaded, quiet=quiet)
    if launching:
        with saying(folder.note_interruption), as_file(recipe, loaded) as arguments:
            raise typer.Exit(run_as_group(loaded.deepspeed.processes, "fedloom.cli", arguments))
    from core_training.engine.central import train as train_centrally

    if speaks() and not quiet:
        warn(warnings_of(loaded))

    with (
        saying(folder.note_interruption),
        results_only_on_stdout(),
        opened_engine(loaded) as engine,
        folder.claimed(),
    ):
        folder.prepare(loaded, resume=resume)
        list(folder.new_events())  # those of the run so far
        if not quiet:
            show_left_out(engine.data_report.truncated, engine.data_report.dropped)
            if loaded.stage_part.refers and not loaded.stage_part.samples:
                stderr.print("asking the reference policy about every record, once for the whole run")
        with ticking(loaded.stage, "step", quiet=quiet or as_json) as ticker:
            summary = train_centrally(loaded, engine, folder, ticker.advance, resume=resume)
    for note in filter(None, (event.note for event in folder.new_events())):
        if not quiet:
            stderr.print(printable(note), soft_wrap=True)
    show_summary(asdict(summary), str(folder.path), as_json=as_json, quiet=quiet)
