"""`fedloom train` and `fedloom simulate` for Python: no output, no signal handlers, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from core_training.foundation.errors import InputError
from core_training.foundation.trainable import EvalReport, total
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder, Summary

OnStep = Callable[[int, int], None]
OnRound = Callable[[int, float | None], None]


def train(recipe: Recipe, on_step: OnStep = lambda *_: None, *, resume: bool = False) -> Summary:
    """Train on this machine, in this process, into the folder `recipe.output`.

    `on_step(step, steps in all)` is called after each optimizer step. `resume` goes on with the run that lies there.
    Raises InputError for what does not fit, RunError when a step fails; what was committed stays. Before PyTorch is
    imported for the first time, the variables are set that the libraries read (see
    `core_training.foundation.environment`).
    """
    import core_training.foundation.environment  # noqa: F401 - before PyTorch is imported
    from core_training.distributed.launch import opened_engine
    from core_training.engine.central import train as train_centrally
    from core_training.runs.trackers import check_trackers

    check_trackers(recipe)
    folder = RunFolder(Path(recipe.output))
    recipe = _on_this_machine(recipe, folder, resume=resume)
    with opened_engine(recipe) as engine, folder.claimed():
        folder.prepare(recipe, resume=resume)
        return train_centrally(recipe, engine, folder, on_step, resume=resume, heeds_signals=False)


def simulate(recipe: Recipe, on_round: OnRound = lambda *_: None, *, resume: bool = False) -> Summary:
    """Run the recipe's sites on this machine, federated or in gossip, into the folder `recipe.output`.

    `on_round(round, mean training loss)` is called after each round; None is the loss of one that counted for nothing.
    Raises as `train`.
    """
    import core_training.foundation.environment  # noqa: F401 - before PyTorch is imported
    import simulations

    folder = RunFolder(Path(recipe.output))
    recipe = _on_this_machine(recipe, folder, resume=resume)
    with folder.claimed():
        return simulations.simulate(recipe, folder, on_round, resume=resume)


def _on_this_machine(recipe: Recipe, folder: RunFolder, *, resume: bool) -> Recipe:
    """The recipe with its model found, or fetched where it asks for that, and pinned."""
    from core_training.recipe.model_source import on_this_machine

    return on_this_machine(folder.pinned(recipe) if resume else recipe, quiet=True)


def evaluate(run: str | Path, data: str | list[str] | None = None) -> EvalReport:
    """The losses and figures of a finished run's result on records: its own held-out ones, or those of files.

    Raises InputError for a run that has not ended, and for records that do not fit its stage.
    """
    import core_training.foundation.environment  # noqa: F401 - before PyTorch is imported
    from core_training.engine.engine import evaluation_of
    from core_training.runs.finished_run import find_result

    return total(evaluation_of(find_result(Path(run)), data))


def load_run(run: str | Path) -> RunFolder:
    """A run's folder: its `recipe`, its `summary()`, its `status()` and its `events(...)`, finished or not.

    Raises InputError for a folder that holds no run.
    """
    folder = RunFolder(Path(run))
    if not (folder.path / "recipe.yaml").is_file():
        raise InputError(f"{run}: not a run folder (it has no recipe.yaml)")
    return folder
