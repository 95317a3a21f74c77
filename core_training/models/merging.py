"""From a tuned model to a plain one: the adapter into the weights, what stages added out of it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, cast

from torch import nn

from core_training.models.heads import remove_value_head
from core_training.models.precision import undo_train_in_float32
from core_training.models.probe import check_alike, logits_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A tuned model as a plain transformers model in `model.dtype`: its adapter in the weights, no value head.

    Raises RunError where it does not say the same afterwards.
    """
    remove_value_head(model)
    if not hasattr(model, "peft_config"):
        undo_train_in_float32(model)
        return model
    said = logits_of(model)
    _part_shared_weights(model)
    plain = cast("PreTrainedModel", cast("PeftModel", model).merge_and_unload())
    undo_train_in_float32(plain)
    check_alike(said, plain, "merging the adapter")
    return plain


def _part_shared_weights(model: nn.Module) -> None:
    """Give each adapted layer a matrix of its own: merged into a shared one, an adapter would change both layers."""
    from peft.tuners.lora import LoraLayer

    places = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            layer = module.get_base_layer()
            weight = getattr(layer, "weight", None)  # a mixture's experts have none of that name
            if isinstance(weight, nn.Parameter) and places[id(weight)] > 1:
                places[id(weight)] -= 1
                layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
