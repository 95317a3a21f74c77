"""fedloom from Python: `from fedloom import Recipe, train, simulate`. Importing it loads nothing heavy."""

from __future__ import annotations

from pathlib import Path

from core_training import __version__
from core_training.recipe.reading import load_recipe
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder, Summary

__all__ = ["Recipe", "Summary", "__version__", "load_recipe", "simulate", "train"]


def train(recipe: Recipe, resume: bool = False) -> Summary:
    """Train on this machine, in this process, into the recipe's output folder; see `fedloom train`."""
    import core_training.foundation.environment  # noqa: F401 - before PyTorch is imported
    from core_training.distributed.launch import opened_engine
    from core_training.engine.central import train as train_centrally

    folder = RunFolder(Path(recipe.output))
    with opened_engine(recipe) as engine, folder.claimed():
        folder.prepare(recipe, resume)
        return train_centrally(recipe, engine, folder, resume, lambda *_: None)


def simulate(recipe: Recipe, resume: bool = False) -> Summary:
    """Run the recipe's sites on this machine, into the recipe's output folder; see `fedloom simulate`."""
    import core_training.foundation.environment  # noqa: F401 - before PyTorch is imported
    import simulations

    folder = RunFolder(Path(recipe.output))
    with folder.claimed():
        return simulations.simulate(recipe, folder, resume, lambda *_: None)
