"""Opening an engine the way a recipe asks: in this process, or as a DeepSpeed group with this process at its head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from core_training.recipe import Recipe
from core_training.trainable import Trainable


@contextmanager
def opened_engine(recipe: Recipe) -> Iterator[Trainable]:
    """The recipe's engine, closed when the block ends. Raises InputError for a model or data that do not fit."""
    from core_training.engine import open_engine

    engine = open_engine(recipe)
    try:
        yield engine
    finally:
        engine.close()
