"""Runs of the learning benchmarks: what a folder holds already, completed and of the same recipe, is not run again."""

from __future__ import annotations

from pathlib import Path

from core_training.distributed.launch import opened_engine
from core_training.engine.central import train
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from fedloom.console import ticking
from simulations import simulate


def trained_centrally(recipe: Recipe, path: Path) -> Path:
    """Train on this machine; returns `path`."""
    folder = RunFolder(path)
    if folder.completed(recipe) is not None:
        return path
    with opened_engine(recipe) as engine, ticking(path.name, "step") as ticker:
        folder.prepare(recipe, resume=False)
        train(recipe, engine, folder, ticker.advance)
    return path


def trained_together(recipe: Recipe, path: Path) -> Path:
    """Simulate a run of all sites; returns `path`."""
    folder = RunFolder(path)
    if folder.completed(folder.pinned(recipe)) is not None:
        return path
    with ticking(path.name, "round") as ticker:

        def on_round(number: int, loss: float | None) -> None:
            ticker.advance(number, recipe.topology.rounds or 0, f"loss {loss:.4f}" if loss is not None else "")

        simulate(recipe, folder, on_round)
    return path
