"""`fedloom train`: central training from a recipe."""

from __future__ import annotations

from dataclasses import asdict

import typer

from fedloom.options import Json, Out, Overrides, Quiet, RecipePath, Resume

app = typer.Typer()


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train on this machine: one process, or a DeepSpeed group (deepspeed.processes)."""
    from pathlib import Path

    from core_training.recipe import load_recipe
    from core_training.run_folder import RunFolder
    from fedloom.console import show_summary, ticking

    loaded = load_recipe(recipe, ["topology.kind=central", *(overrides or [])])
    folder = RunFolder(out or Path(loaded.output))
    if resume and (done := folder.completed(loaded)) is not None:
        show_summary(done, str(folder.path), json, quiet)
        return
    from core_training.central import train as train_centrally
    from core_training.launch import opened_engine

    with opened_engine(loaded) as engine, ticking(loaded.stage, "step", quiet or json) as ticker:
        folder.prepare(loaded, resume)
        summary = train_centrally(loaded, engine, folder, resume, ticker.advance)
    show_summary(asdict(summary), str(folder.path), json, quiet)
