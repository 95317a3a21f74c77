"""Freeze tuning: the first or the last layers are trained, or chosen modules in them; the rest stays as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from core_training.foundation.errors import InputError
from core_training.parts.tuning_modes.freeze import FREEZE
from core_training.tuning.base import TuningMode
from core_training.tuning.text_part import freeze_other_senses, is_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FreezeTuning(TuningMode):
    """Some layers, or modules in them."""

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with chosen layers left to train. Raises InputError when it has no such layers or modules."""
        settings = self.recipe.tuning.settings(FREEZE)
        stack_name, stack = _layers(model)
        count = settings.trainable_layers
        if abs(count) > len(stack):
            raise InputError(f"tuning.freeze.trainable_layers: {count}, but this model has {len(stack)} layers")
        layers = list(stack)[len(stack) - count :] if count >= 0 else list(stack)[:-count]
        model.requires_grad_(False)
        for layer in layers:
            inside = dict(layer.named_modules())
            chosen = (
                [layer]
                if settings.trainable_modules == "all"
                else _named(
                    inside, settings.trainable_modules, "tuning.freeze.trainable_modules", "a layer of this model"
                )
            )
            for module in chosen:
                module.requires_grad_(True)
        outside = {
            name: module
            for name, module in model.named_modules()
            if not f"{name}.".startswith(f"{stack_name}.")
            and not f"{stack_name}.".startswith(f"{name}.")
            and is_of_text(name)
        }
        for module in _named(
            outside, settings.extra_modules, "tuning.freeze.extra_modules", "outside its layers this model"
        ):
            module.requires_grad_(True)
        if hasattr(model, "score"):
            model.score.requires_grad_(True)
        freeze_other_senses(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise InputError("tuning.freeze: nothing is left to train; set trainable_layers or extra_modules")
        return model


def _layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The stack of the model's layers and its name; a layer's index is its place there."""
    config = model.config.get_text_config()
    # The decoder's own number: what had an encoder, too, calls that one's layers the hidden ones.
    expected = getattr(config, "decoder_layers", None) or getattr(config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == expected and is_of_text(name):
            return name, module
    raise InputError(f"tuning.mode: a {type(model).__name__} has no stack of layers; use full, lora or qlora")


def _named(modules: dict[str, Any], names: list[str], key: str, where: str) -> list[Any]:
    """The modules with one of these names, or with one as the last parts of their own."""
    chosen = []
    for wanted in names:
        found = [module for name, module in modules.items() if f".{name}".endswith(f".{wanted}")]
        if not found:
            own = {name.rpartition(".")[2] for name, module in modules.items() if list(module.parameters())} - {""}
            raise InputError(f"{key}: no '{wanted}'; {where} has {', '.join(sorted(own))}")
        chosen += found
    return chosen
