"""The share of a model's weights that a tuning mode reaches, told where it is less than one would think."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Container
from functools import cache
from typing import TYPE_CHECKING

from torch import nn

from core_training.tuning.text_part import is_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

_ENOUGH = 0.95
_NAMED = 4
_WORTH = 0.01


def adapted_weights(tuned: nn.Module) -> set[int]:
    """The identities of the weights that have adapters."""
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted: set[int] = set()
    for module in tuned.modules():
        if isinstance(module, ParamWrapper):
            adapted.add(id(module.get_param()))
        elif isinstance(module, BaseTunerLayer):
            adapted |= {id(weight) for weight in module.get_base_layer().parameters()}
    return adapted


def tell_reach(what: str, tuned: nn.Module, model: PreTrainedModel, reached: Container[int], hint: str = "") -> None:
    """Say what share of the frozen matrices is `reached`, where that is not nearly all, and what is left out.

    `reached` has identities of parameters. Embeddings and output layer count for nothing: they are left out by
    intention, as is what sees or hears.
    """
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    apart = {id(table.weight) for table in (*tables, model.get_output_embeddings()) if table is not None}
    total, left = 0, Counter[str]()
    for name, parameter in tuned.named_parameters():
        if parameter.dim() < 2 or parameter.requires_grad or id(parameter) in apart or not is_of_text(name):
            continue
        total += parameter.numel()
        if id(parameter) not in reached:
            left[_pattern(name)] += parameter.numel()
    share = 1 - sum(left.values()) / total if total else 1.0
    if share < _ENOUGH:
        most = [f"{name} ({size / total:.0%})" for name, size in left.most_common(_NAMED) if size / total >= _WORTH]
        _tell(f"{what} {share:.0%} of the layers' weights; left out: {', '.join(most)}{hint}")


@cache
def _tell(message: str) -> None:
    """Say it once, however often such a model is made in this process."""
    _log.warning("%s", message)


def _pattern(name: str) -> str:
    """A parameter's name in the model itself, with a star for each number of a layer."""
    return re.sub(r"\.\d+\.", ".*.", name.removeprefix("base_model.model.").replace(".base_layer.", "."))
