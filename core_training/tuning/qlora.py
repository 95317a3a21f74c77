"""QLoRA: LoRA on a base whose linear layers are held in four bits (Dettmers et al. 2023).

The layers are quantised in memory and on the CPU, from the very weights that LoRA would train beside. So earlier runs
were merged unquantised, PiSSA and OLoRA quantise what they leave, and sites with and without a GPU hold the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from core_training.foundation.errors import InputError
from core_training.parts.tuning_modes.qlora import QLORA, Qlora
from core_training.tuning.lora import LoraTuning
from core_training.tuning.reach import is_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class QloraTuning(LoraTuning):
    """Adapters on linear layers that are quantised: all but the output layer, which is as LoRA leaves it."""

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        output = model.get_output_embeddings()
        layers = {module for module in model.modules() if module is not output and _can_be_quantised(module)}
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


def _can_be_quantised(module: nn.Module) -> bool:
    """Whether a layer is a linear one, whatever it is called; GPT-2's Conv1D is one whose weights lie the other way."""
    return isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and is_linear(module))


def _quantised(linear: nn.Linear | Conv1D, settings: Qlora, dtype: str) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[attr-defined]

    weight_data = linear.weight.data.T.contiguous() if isinstance(linear, Conv1D) else linear.weight.data
    layer: Any = Linear4bit(
        weight_data.shape[1],
        weight_data.shape[0],
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
        weight_data,
        requires_grad=False,
        compress_statistics=settings.double_quant,
        quant_type=settings.quant_type,
        module=layer,
    )
    layer.weight = weight.to("cpu")
    layer.bias = linear.bias
    return cast(nn.Module, layer)
