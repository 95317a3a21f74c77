"""How far a site goes in a round where the recipe says it in passes over the site's own records. Pure."""

from __future__ import annotations

import math

from core_training.recipe.schema import Recipe


def batches_of_an_epoch(rows: int, batch_size: int, processes: int) -> int:
    """The batches that so many rows make at each process of a group: the rest is one where each gets a row of it."""
    whole, rest = divmod(rows, batch_size * processes)
    return max(1, whole + (rest >= processes))


def steps_of_a_round(recipe: Recipe, rows: int, processes: int) -> int:
    """The optimizer steps of a round at a site with so many training rows, at most: one or more.

    As many as the recipe says; by `local_epochs`, those of so many passes over the rows, rounded up.
    """
    topology, training = recipe.topology, recipe.training
    if topology.local_epochs is None:
        return topology.most_local_steps or 1
    batches = batches_of_an_epoch(rows, training.per_device_train_batch_size, processes)
    steps = topology.local_epochs * math.ceil(batches / training.gradient_accumulation_steps)
    return max(1, math.ceil(round(steps, 6)))  # 0.1 × 30 is 3, not a little more


def at_its_pace(recipe: Recipe, rows: int) -> Recipe:
    """The recipe as a site with so many training rows carries it out: its passes as steps."""
    if recipe.topology.local_epochs is None:
        return recipe
    processes = recipe.deepspeed.processes if recipe.deepspeed.used else 1
    steps = steps_of_a_round(recipe, rows, processes)
    topology = recipe.topology.model_copy(update={"local_epochs": None, "local_steps": steps})
    return recipe.model_copy(update={"topology": topology})
