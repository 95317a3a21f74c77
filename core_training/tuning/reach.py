"""The share of a model's weights that a tuning mode reaches: a run tells where it is less than one would think."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from torch import nn

from core_training.tuning.text_part import is_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

_ENOUGH = 0.95
_OF_ADAPTERS = ".lora_"
"""In the names of fixed factors, which are none of the model's weights."""
_NAMED = 4
_WORTH = 0.01


@dataclass(frozen=True)
class Reach:
    """What share of the layers' weights is reached, and what is left out.

    Embeddings and output layer count for nothing: they are left out by intention, as is what sees or hears.
    """

    what: str
    """The mode and what reaches the weights, as the beginning of a sentence."""
    share: float
    left_out: dict[str, float]
    """The shares of what is not reached, by parameters' names with a star for a layer's number; the largest first."""
    hint: str = ""
    """What to do about it, where anything is."""

    def __str__(self) -> str:
        said = f"{self.what} {self.share:.0%} of the layers' weights"
        most = [f"{name} ({size:.0%})" for name, size in self.left_out.items() if size >= _WORTH][:_NAMED]
        return said + (f"; left out: {', '.join(most)}{self.hint}" if most else "")


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


def reach_of(what: str, tuned: nn.Module, model: PreTrainedModel, reached: Container[int], hint: str = "") -> Reach:
    """The share of the frozen matrices that is `reached`, which has identities of parameters."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    apart = {id(table.weight) for table in (*tables, model.get_output_embeddings()) if table is not None}
    total, left = 0, Counter[str]()
    for name, parameter in tuned.named_parameters():
        if parameter.dim() < 2 or parameter.requires_grad or id(parameter) in apart or not is_of_text(name):
            continue
        if _OF_ADAPTERS in name:
            continue
        total += parameter.numel()
        if id(parameter) not in reached:
            left[_pattern(name)] += parameter.numel()
    share = 1 - sum(left.values()) / total if total else 1.0
    return Reach(what, share, {name: size / total for name, size in left.most_common()}, hint)


def tell_reach(reach: Reach) -> None:
    """Say what share is reached, where that is not nearly all."""
    if reach.share < _ENOUGH:
        _tell(str(reach))


@cache
def _tell(message: str) -> None:
    """Say it once, however often such a model is made in this process."""
    _log.warning("%s", message)


def _pattern(name: str) -> str:
    """A parameter's name in the model itself, with a star for each number of a layer."""
    return re.sub(r"\.\d+\.", ".*.", name.removeprefix("base_model.model.").replace(".base_layer.", "."))
