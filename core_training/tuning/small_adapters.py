"""Adapters that are vectors: IA³ and VeRA, by PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from core_training.foundation.errors import InputError
from core_training.parts.tuning_modes.ia3 import IA3
from core_training.parts.tuning_modes.lora import Lora
from core_training.parts.tuning_modes.vera import VERA
from core_training.tuning.base import TuningMode
from core_training.tuning.reach import adapted_weights, tell_reach
from core_training.tuning.targets import modules_named, targets_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _SmallAdapters(TuningMode):
    """What both have in common."""

    @property
    def _task(self) -> str:
        return "SEQ_CLS" if self.recipe.stage_part.head == "score" else "CAUSAL_LM"

    def _adapted(self, model: PreTrainedModel, config: Any) -> PreTrainedModel:
        from peft import get_peft_model

        try:
            tuned = get_peft_model(model, config)
        except (TypeError, ValueError) as error:
            raise InputError(f"tuning.{self.recipe.tuning.mode}: {str(error).splitlines()[0]}") from None
        return cast("PreTrainedModel", tuned)  # it hands on to the model inside what it has not itself


class Ia3Tuning(_SmallAdapters):
    """Factors on the outputs of some layers, and on the inputs of others."""

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with factors. Raises InputError for modules that it has not, or where PEFT knows none for it."""
        from peft import IA3Config

        settings, targets = self.recipe.tuning.settings(IA3), None
        if settings.target_modules is not None:
            targets = modules_named(model, "tuning.ia3.target_modules", settings.target_modules)
        forward = modules_named(model, "tuning.ia3.feedforward_modules", settings.feedforward_modules or [])
        if forward and not set(forward) <= set(targets or []):
            raise InputError("tuning.ia3.feedforward_modules: each must be one of target_modules, too")
        if targets is not None:
            return self._adapted(
                model, IA3Config(target_modules=targets, feedforward_modules=forward, task_type=self._task)
            )
        return self._adapted(model, IA3Config(task_type=self._task))


class VeraTuning(_SmallAdapters):
    """Two vectors for each layer, beside factors that all layers share."""

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with scales. Raises InputError when a chosen module is not there."""
        from peft import VeraConfig

        settings = self.recipe.tuning.settings(VERA)
        targets = targets_of(model, Lora(target_modules=settings.target_modules, experts=False))
        config = VeraConfig(
            r=settings.r,
            d_initial=settings.d_initial,
            vera_dropout=settings.vera_dropout,
            target_modules=targets.modules,
            projection_prng_key=self.recipe.training.seed,
            save_projection=False,  # whoever loads the adapter draws the same factors
            task_type=self._task,
        )
        tuned = self._adapted(model, config)
        tell_reach("tuning.vera: adapters reach", tuned, model, adapted_weights(tuned))
        return tuned
