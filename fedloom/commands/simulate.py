"""`fedloom simulate`: many sites on this machine, federated or gossip."""

from __future__ import annotations

from dataclasses import asdict

import typer

from core_training.foundation.foreign_text import printable
from fedloom.options import Json, Out, Overrides, Quiet, RecipePath, Resume

app = typer.Typer()


@app.command()
def simulate(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Many sites on this machine: federated or gossip, as the recipe's topology says."""
    from pathlib import Path

    from core_training.foundation.errors import InputError
    from core_training.foundation.stopping import saying
    from core_training.recipe.model_source import on_this_machine
    from core_training.recipe.reading import load_recipe
    from core_training.runs.events import Round
    from core_training.runs.run_folder import RunFolder
    from fedloom.console import results_only_on_stdout, show_summary, stderr, ticking, warn
    from fedloom.recipe_account import warnings_of

    loaded = load_recipe(recipe, overrides)
    if loaded.topology.kind == "central":
        raise InputError("topology.kind: a simulation is 'federated' or 'gossip'; `fedloom train` runs 'central'")
    if loaded.topology.kind == "gossip" and loaded.simulation.engine == "ray":
        raise InputError("simulation.engine: 'ray' runs federated simulations; gossip needs 'inprocess'")
    if loaded.deepspeed.used:
        raise InputError("deepspeed: the sites of a simulation train in turn in one process without it; leave it out")
    folder = RunFolder(out or Path(loaded.output))
    loaded = folder.pinned(loaded) if resume else loaded
    if resume and (done := folder.completed(loaded)) is not None:
        show_summary(done, str(folder.path), as_json=as_json, quiet=quiet)
        return
    folder.check_place()
    loaded = on_this_machine(loaded, quiet=quiet)
    from simulations import simulate as run_simulation

    if not quiet:
        warn(warnings_of(loaded))
    rounds = loaded.topology.rounds or 0
    list(folder.new_events())  # those of the run so far, or of an earlier one
    with (
        saying(folder.note_interruption),
        results_only_on_stdout(),
        folder.claimed(),
        ticking(loaded.topology.kind, "round", quiet=quiet or as_json) as ticker,
    ):

        def show_news() -> None:
            for event in folder.new_events():
                if isinstance(event, Round):
                    words = f"loss {event.loss:.4f}" if event.loss is not None else ""
                    ticker.advance(event.rounds_done or event.round, rounds, words)
                elif event.note is not None and not quiet:
                    stderr.print(printable(event.note), soft_wrap=True)

        try:
            summary = run_simulation(loaded, folder, lambda *_: show_news(), resume=resume)
        finally:
            show_news()
    show_summary(asdict(summary), str(folder.path), as_json=as_json, quiet=quiet)
