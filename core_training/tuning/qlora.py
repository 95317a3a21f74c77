"""QLoRA: LoRA on a base whose linear layers are held in four bits (Dettmers et al. 2023).

The layers are quantised in memory and on the CPU, from the very weights that LoRA would train beside. So earlier runs
were merged unquantised, PiSSA and OLoRA quantise what they leave, and sites with and without a GPU hold the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from core_training.foundation.errors import InputError
from core_training.parts.tuning_modes.qlora import QLORA
from core_training.tuning.lora import LoraTuning
from core_training.tuning.reach import Reach, reach_of, tell_reach
from core_training.tuning.targets import experts, inside_routers, is_linear, read_elsewhere

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class QloraTuning(LoraTuning):
    """Adapters on weights that are quantised: all linear layers but the output, which is as LoRA leaves it."""

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        from core_training.tuning.four_bits import adapt_on_four_bits, quantise_parameter, quantised_layer

        layers, tensors = _to_quantise(model)
        tuned = super().apply(model)
        tell_reach(_held(tuned, model, layers, tensors))
        settings = self.recipe.tuning.settings(QLORA)
        wrappers = [module for module in tuned.modules() if isinstance(module, ParamWrapper)]
        by_weight = {id(wrapper.get_base_layer()) for wrapper in wrappers}
        tensors += [(layer, "weight") for layer in layers if id(layer) in by_weight]
        places = [
            (parent, name)
            for parent in tuned.modules()
            for name, child in parent.named_children()
            if child in layers and id(child) not in by_weight
        ]
        layers.clear()  # each is let go as soon as it is replaced
        for parent, name in places:
            setattr(parent, name, quantised_layer(getattr(parent, name), settings, self.recipe.model.dtype))
        for module, name in tensors:
            quantise_parameter(module, name, settings)
        for wrapper in wrappers:
            if is_parametrized(wrapper.get_base_layer(), wrapper.parameter_name):
                adapt_on_four_bits(wrapper)
        return tuned

    def reach(self, model: PreTrainedModel) -> list[Reach]:
        layers, tensors = _to_quantise(model)
        tuned, adapters = self.adapted(model)
        return [adapters, _held(tuned, model, layers, tensors)]

    @property
    def held(self) -> dict[str, Any]:
        return self.recipe.tuning.settings(QLORA).model_dump()


def _to_quantise(model: PreTrainedModel) -> tuple[set[nn.Module], list[tuple[nn.Module, str]]]:
    """The layers, and the places of experts' tensors. Raises InputError where there is nothing."""
    layers, tensors = _layers(model), [_place(model, name) for name in experts(model)]
    if not layers and not tensors:
        raise InputError(f"tuning.mode: a {type(model).__name__} has no linear layers to quantise; use lora")
    return layers, tensors


def _held(
    tuned: PreTrainedModel, model: PreTrainedModel, layers: set[nn.Module], tensors: list[tuple[nn.Module, str]]
) -> Reach:
    weights: set[Any] = {layer.weight for layer in layers} | {getattr(module, name) for module, name in tensors}
    return reach_of("tuning.qlora: four bits hold", tuned, model, {id(weight) for weight in weights})


def _layers(model: PreTrainedModel) -> set[nn.Module]:
    """The linear layers that can be held in four bits: no other code reads their weights, and they route nothing."""
    left_alone, output = read_elsewhere(model) | inside_routers(model), model.get_output_embeddings()
    return {
        module
        for name, module in model.named_modules()
        if module is not output and name not in left_alone and is_linear(module)
    }


def _place(model: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter, and its name there."""
    module, _, name = parameter.rpartition(".")
    return model.get_submodule(module), name
