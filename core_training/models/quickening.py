"""Faster ways to compute the same: Liger's kernels, and PyTorch's compiler."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from core_training.models.heads import innermost
from core_training.recipe.sections.training import Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)


def quicken(model: PreTrainedModel, training: Training) -> None:
    """Have a tuned model computed as the settings say; what this machine cannot do is told, and left out."""
    if training.use_liger_kernel:
        _use_liger(model)
    if training.torch_compile:
        model.compile(dynamic=True)


def _use_liger(model: PreTrainedModel) -> None:
    if not torch.cuda.is_available() or find_spec("liger_kernel") is None:
        lacking = "a GPU" if not torch.cuda.is_available() else "the package liger-kernel"
        _log.warning("training.use_liger_kernel: without effect here, as it needs %s", lacking)
        return
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    inner = innermost(model)
    library = vars(sys.modules[type(inner).__module__])
    names = dict(library)
    # The loss is computed where labels are alone (decision 010), which saves more than the fused output layer would.
    _apply_liger_kernel_to_instance(inner, fused_linear_cross_entropy=False, cross_entropy=False, rope=False)
    library.update(names)  # it changes the library's classes, too, and models on the CPU are made of them
