"""Where a recipe's base model comes from: a folder, this machine's cache, or, where the recipe asks for it, the hub.

A run of a model on the hub is pinned: its recipe names the commit and the digest of the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core_training.foundation.hub_models import HubModel, hub_model
from core_training.foundation.model_files import weights_digest
from core_training.recipe.schema import Recipe


def on_this_machine(recipe: Recipe, *, quiet: bool = False) -> Recipe:
    """The recipe with its model pinned, and fetched where it asks for that and the cache lacks it.

    A recipe of a folder, or of a model that is not here, is left as it is: what loads the model says what it lacks.
    Raises as `fetch`.
    """
    model = hub_model(recipe.model.name_or_path)
    if model is None:
        return recipe
    folder = model.snapshot()
    if folder is None and recipe.model.download:
        from core_training.foundation.hub_fetch import fetch  # it settles the environment of the whole process

        folder = fetch(model, quiet=quiet).folder
    return recipe if folder is None else _pinned(recipe, model, folder)


def as_pinned_before(recipe: Recipe, earlier: Recipe) -> Recipe:
    """The recipe with its model at the commit at which an earlier run pinned it, if it asks for no other one."""
    asked, before = hub_model(recipe.model.name_or_path), hub_model(earlier.model.name_or_path)
    if asked is None or before is None or asked.name != before.name or not before.is_pinned:
        return recipe
    if asked.revision not in (None, before.revision):
        return recipe
    return _with_model(recipe, name_or_path=str(before), digest=recipe.model.digest or earlier.model.digest)


def _pinned(recipe: Recipe, model: HubModel, folder: Path) -> Recipe:
    digest = recipe.model.digest or weights_digest(folder)
    return _with_model(recipe, name_or_path=str(model.at(folder.name)), digest=digest)


def _with_model(recipe: Recipe, **values: Any) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=values)})
