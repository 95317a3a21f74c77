"""Adapters that are vectors: IA³ and VeRA, by PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from core_training.foundation.errors import InputError
from core_training.parts.tuning_modes.ia3 import IA3
from core_training.parts.tuning_modes.vera import VERA
from core_training.tuning.base import TuningMode
from core_training.tuning.reach import Reach, adapted_weights, reach_of, tell_reach
from core_training.tuning.targets import linear_layers, modules_named
from core_training.tuning.text_part import freeze_other_senses

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_VERA_KEY = "tuning.vera.target_modules"


class SmallAdapters(TuningMode):
    """What modes with adapters of few trained values have in common."""

    @property
    def _task(self) -> str:
        return "SEQ_CLS" if self.recipe.stage_part.head == "score" else "CAUSAL_LM"

    def _adapted(self, model: PreTrainedModel, config: Any) -> PreTrainedModel:
        from peft import get_peft_model

        try:
            tuned = get_peft_model(model, config)
        except (TypeError, ValueError) as error:
            raise InputError(f"tuning.{self.recipe.tuning.mode}: {str(error).splitlines()[0]}") from None
        freeze_other_senses(tuned)  # PEFT's own choice goes by the last parts of names
        return cast("PreTrainedModel", tuned)  # it hands on to the model inside what it has not itself


class Ia3Tuning(SmallAdapters):
    """Factors on the outputs of some layers, and on the inputs of others."""

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with factors. Raises InputError for modules that it has not, or where PEFT knows none for it."""
        from peft import IA3Config

        settings = self.recipe.tuning.settings(IA3)
        targets, forward = (
            None if names is None else modules_named(model, f"tuning.ia3.{key}", names)
            for key, names in settings.model_dump().items()
        )
        if targets is not None and forward is not None and not set(forward) <= set(targets):
            raise InputError("tuning.ia3.feedforward_modules: each must be one of target_modules, too")
        config = IA3Config(target_modules=targets, feedforward_modules=forward, task_type=self._task)
        return self._adapted(model, config)


class VeraTuning(SmallAdapters):
    """Two vectors for each layer, beside factors that all layers share."""

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with scales. Raises InputError when a chosen module is not there."""
        tuned = self._with_scales(model)
        tell_reach(_of_vera(tuned, model))
        return tuned

    def reach(self, model: PreTrainedModel) -> list[Reach]:
        return [_of_vera(self._with_scales(model), model)]

    def _with_scales(self, model: PreTrainedModel) -> PreTrainedModel:
        from peft import VeraConfig

        settings = self.recipe.tuning.settings(VERA)
        names = settings.target_modules
        targets = linear_layers(model) if names == "all-linear" else modules_named(model, _VERA_KEY, list(names))
        config = VeraConfig(
            r=settings.r,
            d_initial=settings.d_initial,
            vera_dropout=settings.vera_dropout,
            target_modules=targets,
            projection_prng_key=self.recipe.training.seed,
            save_projection=False,  # whoever loads the adapter draws the same factors
            task_type=self._task,
        )
        return self._adapted(model, config)


def _of_vera(tuned: PreTrainedModel, model: PreTrainedModel) -> Reach:
    return reach_of("tuning.vera: adapters reach", tuned, model, adapted_weights(tuned))
