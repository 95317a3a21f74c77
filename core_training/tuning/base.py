"""The interface of a tuning mode, which has a part of a plain model trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from core_training.recipe.schema import Recipe

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn
    from transformers import PreTrainedModel

    from core_training.tuning.reach import Reach


class TuningMode:
    """One recipe's choice of what is trained."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with `requires_grad` set on exactly what is trained.

        `model` is a transformers model whose weights are all there, unquantised. Raises InputError where the recipe
        does not fit it.
        """
        raise NotImplementedError

    def reach(self, model: PreTrainedModel) -> list[Reach]:
        """What shares of a model the mode reaches, where it is one that adapts or holds some weights and not others.

        `model` may be without values, on the meta device; it is changed. Raises InputError as `apply` does.
        """
        return []

    @property
    def held(self) -> dict[str, Any]:
        """The settings of how frozen weights are held, where it is not as in the files: sites must have them alike."""
        return {}

    @property
    def changes_frozen(self) -> bool:
        """Whether frozen weights lose what the trained ones start with: sites must have them alike, bit for bit."""
        return False

    def is_as_in_files(self, name: str) -> bool:
        """Whether a frozen parameter, by its name in the tuned model, is as in the model's files; else sites must have
        it alike, bit for bit."""
        return not self.changes_frozen

    def folded(self, model: nn.Module, tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """The trained tensors by name, with PEFT's in the place of those that the part says are to be folded.

        `model` is the tuned one, and holds them.
        """
        return dict(tensors)


def load_tuning(recipe: Recipe) -> TuningMode:
    """The recipe's tuning mode."""
    mode: TuningMode = recipe.tuning_part.load()(recipe)
    return mode
