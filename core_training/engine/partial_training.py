"""Training of a part of the state: tensors that are left alone for a slice, and rows of a tensor that are.

A tensor that is left alone gets no gradient, so the optimizer passes it over and its moments stay. A row of one that
trains gets a gradient of 0 and is put back after each step, whatever weight decay or another row's gradient did to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from core_training.foundation.trainable import TrainedPart
from core_training.models.parameters import Parameters


@contextmanager
def only(parameters: Parameters, optimizer: Any, part: TrainedPart) -> Iterator[None]:
    """Let the steps that `optimizer` (PyTorch's own) takes within change no more than `part`."""
    with ExitStack() as undo:
        for name in part.frozen:
            undo.callback(parameters[name].requires_grad_, True)
            parameters[name].requires_grad_(False)
        rest = {name: _rest_of(parameters[name], *first) for name, first in part.first.items()}
        kept = {name: view.clone() for name, view in rest.items()}
        for name, (axis, first) in part.first.items():
            undo.callback(parameters[name].register_hook(partial(_masked, axis=axis, first=first)).remove)

        def put_back() -> None:
            with torch.no_grad():
                for name, view in rest.items():
                    view.copy_(kept[name])

        if rest:
            undo.callback(optimizer.register_step_post_hook(lambda *_: put_back()).remove)
        yield


def _rest_of(tensor: Any, axis: int, first: int) -> torch.Tensor:
    """A view of what lies behind the first rows along an axis."""
    rest: torch.Tensor = tensor.detach().narrow(axis, first, tensor.shape[axis] - first)
    return rest


def _masked(gradient: torch.Tensor, axis: int, first: int) -> torch.Tensor:
    masked = gradient.clone()
    _rest_of(masked, axis, first).zero_()
    return masked
