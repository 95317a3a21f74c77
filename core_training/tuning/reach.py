"""The layers that adapters can stand on, and the share of a model's weights that they reach."""

from __future__ import annotations

import logging
import re
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

_ENOUGH = 0.95
_NAMED = 4
_WORTH = 0.01


def unlike_linear(model: PreTrainedModel) -> list[str]:
    """The names of layers that are linear by inheritance alone, as routers that give scores and choices at once."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and not is_linear(module)]


@torch.no_grad()
def is_linear(module: nn.Linear) -> bool:
    """Whether the layer gives what a linear one would: one tensor of its width."""
    if type(module).forward is nn.Linear.forward:
        return True
    try:
        output = module(torch.zeros(1, module.in_features, dtype=module.weight.dtype, device=module.weight.device))
    except Exception:  # it wants something else than a tensor of this shape
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, module.out_features)


def tell_reach(tuned: nn.Module, model: PreTrainedModel) -> None:
    """Say what share of the layers' weights is adapted, where that is not nearly all, and what is left out.

    Embeddings and output layer count for nothing: they are left out by intention.
    """
    from peft.tuners.lora import LoraLayer

    apart = {id(table.weight) for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table}
    reached = {
        id(weight)
        for module in tuned.modules()
        if isinstance(module, LoraLayer)
        for weight in module.get_base_layer().parameters()
    }
    trained = {id(parameter) for parameter in tuned.parameters() if parameter.requires_grad}
    total, left = 0, Counter[str]()
    for name, parameter in tuned.named_parameters():
        if "lora_" in name or parameter.dim() < 2 or id(parameter) in apart | trained:
            continue
        total += parameter.numel()
        if id(parameter) not in reached:
            left[_pattern(name)] += parameter.numel()
    share = 1 - sum(left.values()) / total if total else 1.0
    if share < _ENOUGH:
        most = [f"{name} ({size / total:.0%})" for name, size in left.most_common(_NAMED) if size / total >= _WORTH]
        _tell(f"tuning.lora: adapters reach {share:.0%} of the layers' weights; left out: {', '.join(most)}")


@cache
def _tell(message: str) -> None:
    """Say it once, however often such a model is made in this process."""
    _log.warning("%s", message)


def _pattern(name: str) -> str:
    """A parameter's name with a star for each number of a layer."""
    return re.sub(r"\.\d+\.", ".*.", name.removeprefix("base_model.model."))
