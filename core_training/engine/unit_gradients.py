"""The gradient of each row of a batch, out of one pass forward and one back.

A linear layer's gradient for one row is the product of what went into it and what came back to its output, both of
that row (Goodfellow 2015): hooks see them pass by. That covers LoRA's factors and every trained layer that is linear
and keeps the rows apart; others need a pass for each row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from core_training.data.examples import Batch
from core_training.data.rows import SEQUENCE_TENSORS


class RowGradients:
    """The gradients of one batch's `rows`, filled while its loss is computed and led back.

    A batch of n rows with k sequences each holds k·n sequences, all first ones before all second ones (`data.rows`).
    """

    def __init__(self, rows: int, sequences: int) -> None:
        """`rows` of so many `sequences` each."""
        self.rows = rows
        self.sequences = sequences
        self.of: dict[torch.Tensor, torch.Tensor] = {}
        """Of each parameter that was reached, float32, shape (rows, *parameter)."""
        self.are_apart = True
        """Whether every layer was given the rows one by one. If not, the gradients are good for nothing."""

    def norms(self) -> torch.Tensor:
        """The L2 norm of each row's gradient over all parameters, shape (rows,)."""
        return torch.stack([one.flatten(1).square().sum(dim=1) for one in self.of.values()]).sum(dim=0).sqrt()

    def finite_norms(self) -> tuple[torch.Tensor, int]:
        """The same, and how many rows' gradients are no numbers: these have none from now on, and their norm is 0."""
        norms = self.norms()
        lost = torch.nonzero(~torch.isfinite(norms)).flatten()
        for gradients in self.of.values() if len(lost) else ():
            gradients[lost] = 0
        norms[lost] = 0
        return norms, len(lost)

    def add_weighted(self, weights: torch.Tensor, parameter: torch.Tensor, to: torch.Tensor) -> None:
        """Add the rows' gradients of a parameter, times `weights` of shape (rows,), to a tensor of its shape."""
        if parameter in self.of:
            to.add_(torch.tensordot(weights, self.of[parameter], dims=1))

    def note(self, parameter: torch.Tensor, gradients: torch.Tensor) -> None:
        """Add gradients of sequences, shape (sequences, *parameter); a layer may be asked several times."""
        by_row = gradients.unflatten(0, (-1, self.rows)).sum(dim=0)
        self.of[parameter] = self.of[parameter] + by_row if parameter in self.of else by_row


class LinearGradients:
    """The hooks on the linear layers that are trained. They cost nothing but while a batch is recorded."""

    def __init__(self, layers: Mapping[nn.Linear, tuple[torch.Tensor | None, torch.Tensor | None]]) -> None:
        self._layers = layers

    @classmethod
    def of(cls, model: nn.Module, trained: Mapping[str, Any]) -> Self | None:
        """Those of `model`, whose trained parameters these are; None where not all of them belong to linear layers."""
        wanted = {id(parameter) for parameter in trained.values()}
        layers = {}
        for module in model.modules():
            if isinstance(module, nn.Linear):
                own = [p if p is not None and id(p) in wanted else None for p in (module.weight, module.bias)]
                if own != [None, None]:
                    layers[module] = (own[0], own[1])
        held = {id(parameter) for own in layers.values() for parameter in own if parameter is not None}
        return cls(layers) if held == wanted else None

    @contextmanager
    def recorded(self, rows: int, sequences: int = 1) -> Iterator[RowGradients]:
        """Record the gradients of a batch of so many rows of `sequences` each, whose loss is led back within."""
        record = RowGradients(rows, sequences)
        handles = [
            layer.register_forward_hook(partial(_watch, record, weight, bias))
            for layer, (weight, bias) in self._layers.items()
        ]
        try:
            yield record
        finally:
            for handle in handles:
                handle.remove()


def _watch(
    record: RowGradients,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    layer: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    output: torch.Tensor,
) -> None:
    """Have what comes back to a layer's output meet what went in."""
    if not output.requires_grad:  # the first pass of gradient checkpointing, or a layer that this round leaves alone
        return
    given = inputs[0].detach() if inputs else output.new_empty(0)  # asked by a keyword
    if given.dim() < 2 or given.shape[0] not in (record.rows, record.rows * record.sequences):
        record.are_apart = False
        return

    def meet(returned: torch.Tensor) -> None:
        # Shapes: (sequences, …, inputs) and (sequences, …, outputs); what lies between is summed over.
        back, went_in = (
            one.detach().float().flatten(1, -2) if one.dim() > 2 else one.detach().float().unsqueeze(1)
            for one in (returned, given)
        )
        if weight is not None and weight.requires_grad:
            record.note(weight, torch.einsum("nto,nti->noi", back, went_in))
        if bias is not None and bias.requires_grad:
            record.note(bias, back.sum(dim=1))

    output.register_hook(meet)


def batch_row(batch: Batch, row: int, rows: int) -> Batch:
    """One row of a batch of so many, with all its sequences; none of it is copied."""
    return {
        name: tensor[row::rows] if name in SEQUENCE_TENSORS else tensor[row : row + 1] for name, tensor in batch.items()
    }
