"""QLoRA: LoRA on a base whose linear layers are held in four bits (Dettmers et al. 2023).

The layers are quantised in memory and on the CPU, from the very weights that LoRA would train beside. So earlier runs
were merged unquantised, PiSSA and OLoRA quantise what they leave, and sites with and without a GPU hold the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from core_training.foundation.errors import InputError
from core_training.parts.tuning_modes.qlora import QLORA, Qlora
from core_training.tuning.lora import LoraTuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class QloraTuning(LoraTuning):
    """Adapters on linear layers that are quantised: all but the output layer, which is as LoRA leaves it."""

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        output = model.get_output_embeddings()
        layers = {module for module in model.modules() if type(module) is nn.Linear and module is not output}
        if not layers:
            raise InputError(f"tuning.mode: a {type(model).__name__} has no linear layers to quantise; use lora")
        tuned = super().apply(model)
        places = [
            (parent, name) for parent in tuned.modules() for name, child in parent.named_children() if child in layers
        ]
        layers.clear()  # each is let go as soon as it is replaced
        settings = self.recipe.tuning.settings(QLORA)
        for parent, name in places:
            setattr(parent, name, _quantised(getattr(parent, name), settings, self.recipe.model.dtype))
        return tuned

    @property
    def held(self) -> dict[str, Any]:
        return self.recipe.tuning.settings(QLORA).model_dump()


def _quantised(linear: nn.Linear, settings: Qlora, dtype: str) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[attr-defined]

    layer: Any = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=getattr(torch, settings.compute_dtype or dtype),
        compress_statistics=settings.double_quant,
        quant_type=settings.quant_type,
        device="meta",
    )
    # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks the weight at the first forward in evaluation; later forwards
    # in training then have no gradient. Without effect on a GPU.
    layer.support_avx512bf16_for_cpu = False
    weight: Any = Params4bit(
        linear.weight.data,
        requires_grad=False,
        compress_statistics=settings.double_quant,
        quant_type=settings.quant_type,
        module=layer,
    )
    layer.weight = weight.to("cpu")
    layer.bias = linear.bias
    return cast(nn.Module, layer)
