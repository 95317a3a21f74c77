"""Weights that are trained are float32, also in a model that is held and computes in bfloat16.

Bfloat16 keeps three digits of a weight: the steps that training takes are smaller, and would be rounded away. DeepSpeed
keeps float32 copies of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from core_training.models.heads import Head, innermost

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def train_in_float32(model: PreTrainedModel) -> None:
    """Make what is trained of a bfloat16 model float32, and have the model compute in bfloat16 all the same."""
    rounded = [p for p in model.parameters() if p.requires_grad and p.dtype == torch.bfloat16]
    if not rounded:
        return
    for parameter in rounded:
        parameter.data = parameter.data.float()
    inner: Any = innermost(model)
    inner.forward = MethodType(_in_bfloat16(type(inner).forward), inner)
    if hasattr(inner, "generate"):  # so that weights are rounded once for an answer, and not for each of its tokens
        inner.generate = MethodType(_in_bfloat16(type(inner).generate), inner)


def undo_train_in_float32(model: PreTrainedModel) -> None:
    """Hold all of a plain transformers model as it was loaded, but for its heads, where the above was done."""
    if vars(model).pop("forward", None) is None:
        return
    vars(model).pop("generate", None)
    for module in model.modules():
        if not isinstance(module, Head):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(model.config.dtype)


def _in_bfloat16(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def computing_in_bfloat16(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(model.device.type, torch.bfloat16):
            return method(model, *args, **kwargs)

    return computing_in_bfloat16
