"""The peak learning rate of a run whose recipe gives none: by stage and mode, the model's width and the sites.

The stages' parts state what is usual for models of 7 and 8 billion parameters. A rate of Adam's goes with 1/width (Yang
et al. 2022, μP; of QLoRA's rates, Dettmers et al. 2023, those of the wide models are half), and a mean of many sites
bears more than one site alone: its noise is less, and it makes fewer steps one after another. See docs/stages.md.
"""

from __future__ import annotations

import math
from statistics import median_low
from typing import TYPE_CHECKING

from core_training.parts.tuning_modes.lora import LORA
from core_training.recipe.schema import Recipe

if TYPE_CHECKING:
    from core_training.foundation.state import Manifest

USUAL_WIDTH = 4096
_NARROWEST, _WIDEST = 256, 16384
"""Of the models for which a rate goes with the width: no narrower one was tried."""
_WITHOUT_WIDTH = ("lora_B", "lora_embedding_A", "lora_embedding_B")
"""Matrices that take what another one gives, or a word's number."""


def width_of(manifest: Manifest) -> int | None:
    """The number of inputs that most of the trained layers have; None where no matrix is trained."""
    inputs = [
        tensor.shape[-1]
        for tensor in manifest.tensors
        if len(tensor.shape) > 1 and not any(name in tensor.name for name in _WITHOUT_WIDTH)
    ]
    return median_low(inputs) if inputs else None


def learning_rate_of(recipe: Recipe, width: int | None) -> float:
    """The peak learning rate for layers of so many inputs (None: as many as usual): the recipe's own, if it has one."""
    if recipe.training.learning_rate is not None:
        return recipe.training.learning_rate
    sites = 1 if recipe.topology.kind == "central" else recipe.topology.in_round(recipe.topology.sites or 1)
    return recipe.usual_learning_rate * _for_width(width) * for_sites(sites)


def most_learning_rate(recipe: Recipe) -> float:
    """The peak rate of the parameters that learn fastest, whatever the model's width."""
    ratio = recipe.tuning.settings(LORA).loraplus_lr_ratio if recipe.tuning_part.result == "adapter" else None
    return learning_rate_of(recipe, _NARROWEST) * max(ratio or 1.0, 1.0)


def share_of_most(recipe: Recipe, width: int | None) -> float:
    """The peak rate for layers of so many inputs, relative to that of the narrowest."""
    most = learning_rate_of(recipe, _NARROWEST)
    return learning_rate_of(recipe, width) / most if most else 1.0


def for_sites(sites: int) -> float:
    """What a rate grows by with the number of sites; measured over 3, 6 and 20 of them (docs/results.md)."""
    return math.sqrt(sites)


def _for_width(width: int | None) -> float:
    return 1.0 if width is None else USUAL_WIDTH / min(max(width, _NARROWEST), _WIDEST)


def with_sites(recipe: Recipe, sites: int) -> Recipe:
    """The recipe with the number of its sites, where a learning rate goes with it and none is given."""
    if recipe.topology.sites is not None or recipe.training.learning_rate is not None:
        return recipe
    return recipe.model_copy(update={"topology": recipe.topology.model_copy(update={"sites": sites})})
