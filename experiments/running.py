"""Carrying one recipe out by the ways in that `fedloom train` and `fedloom simulate` take, in this process."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from core_training.foundation.errors import InputError, Interrupted, RunError
from core_training.foundation.stopping import hears_signals, saying
from core_training.recipe.schema import Recipe
from core_training.runs.events import Round
from core_training.runs.run_folder import RunFolder

OnProgress = Callable[[int, int, str], None]
"""Told of the steps, or rounds, that are done, of how many there are, and a word on them."""


def check_topology(recipe: Recipe, place: str) -> None:
    """Raise InputError for a recipe that neither way in would take."""
    topology, simulation = recipe.topology.kind, recipe.simulation
    if topology == "central":
        return
    if topology == "gossip" and simulation.engine == "ray":
        raise InputError(f"{place}simulation.engine: 'ray' runs federated simulations; gossip needs 'inprocess'")
    if recipe.deepspeed.used:
        raise InputError(f"{place}deepspeed: the sites of a simulation train in one process without it; leave it out")
    if simulation.sites is None and simulation.partition is None:
        raise InputError(
            f"{place}simulation: {topology} steps are simulated; give the sites' files (simulation.sites) or a "
            "partition (simulation.partition)"
        )


def run_recipe(recipe: Recipe, on_progress: OnProgress = lambda *_: None, *, resume: bool = False) -> dict[str, Any]:
    """Train what the recipe says into `recipe.output`, or go on with the run there; returns its summary.

    Raises as the commands: InputError, RunError, and Interrupted with everything saved.
    """
    from core_training.distributed.launch import must_launch, run_as_group
    from core_training.recipe.model_source import on_this_machine
    from core_training.runs.trackers import check_trackers

    folder = RunFolder(Path(recipe.output))
    resume = resume and (folder.path / "recipe.yaml").is_file()
    recipe = folder.pinned(recipe) if resume else recipe
    if resume and (done := folder.completed(recipe)) is not None:
        return done
    check_trackers(recipe)
    folder.check_place()
    recipe = on_this_machine(recipe, quiet=True)
    with saying(folder.note_interruption):
        if must_launch(recipe.deepspeed):
            _run_group(recipe, run_as_group, resume=resume)
        elif recipe.topology.kind == "central":
            _train(recipe, folder, on_progress, resume=resume)
        else:
            _simulate(recipe, folder, on_progress, resume=resume)
    gc.collect()  # a model is part of circles, and the next step loads its own
    summary = folder.summary()
    if summary is None or not folder.has_completed:
        raise RunError(f"{folder.path}: the run ended without a result")
    return summary


def _train(recipe: Recipe, folder: RunFolder, on_progress: OnProgress, *, resume: bool) -> None:
    from core_training.distributed.launch import opened_engine
    from core_training.engine.central import train

    with opened_engine(recipe) as engine, folder.claimed():
        folder.prepare(recipe, resume=resume)
        steps: Callable[[int, int], None] = lambda done, total: on_progress(done, total, "")  # noqa: E731
        train(recipe, engine, folder, steps, resume=resume, heeds_signals=hears_signals())


def _simulate(recipe: Recipe, folder: RunFolder, on_progress: OnProgress, *, resume: bool) -> None:
    from simulations import simulate

    rounds = recipe.topology.rounds or 0
    list(folder.new_events())  # those of the run so far, or of an earlier one

    def tell(*_: object) -> None:
        for event in folder.new_events():
            if isinstance(event, Round):
                words = "" if event.loss is None else f"loss {event.loss:.4f}"
                on_progress(event.rounds_done or event.round, rounds, words)

    with folder.claimed():
        simulate(recipe, folder, tell, resume=resume)


def _run_group(recipe: Recipe, run_as_group: Callable[..., int], *, resume: bool) -> None:
    """A DeepSpeed group: `fedloom train` in each of its processes, on the recipe in a file."""
    with NamedTemporaryFile("w", prefix="recipe-", suffix=".yaml", encoding="utf-8") as file:
        file.write(recipe.to_yaml())
        file.flush()
        arguments = ["train", file.name, "--out", recipe.output, "--quiet", *["--resume"] * resume]
        code = run_as_group(recipe.deepspeed.processes, "fedloom.cli", arguments)
    if code > 128:
        raise Interrupted(f"interrupted, and saved in {recipe.output}", signal.Signals(code - 128))
    if code:
        error = InputError if code == InputError.exit_code else RunError
        raise error(f"{recipe.output}: the group ended with code {code}, and said why")
