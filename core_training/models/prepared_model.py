"""A base model as it is computed with: on its device, alone or wrapped for a group, and fed with batches.

Knows nothing of stages, optimizers, steps or rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from core_training.data.examples import Batch, Row
from core_training.data.rows import Collator, padded_size, parts
from core_training.models.base_model import BaseModel
from core_training.models.context import TOKENS_AT_ONCE
from core_training.recipe.schema import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel


class PreparedModel:
    """A model after `accelerate` has prepared it, and the processes that share the work."""

    def __init__(
        self, base: BaseModel, recipe: Recipe, model: nn.Module, accelerator: Accelerator, *, adds_up: bool
    ) -> None:
        """`adds_up` says that a batch's loss is the sum of its rows': on a CPU they are then computed in parts of
        similar length, whose gradients add up to the batch's.
        """
        self._base = base
        self._rows_at_once = recipe.training.per_device_eval_batch_size
        self._adds_up = adds_up
        self.model = model
        """The module of a forward pass: the model, or the DeepSpeed engine around it."""
        self.deepspeed_engine: Any = model if recipe.deepspeed.used else None
        self.accelerator = accelerator
        self._collate = Collator(base.tokenizer.pad_token_id)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def process(self) -> int:
        """The number of this process in the group."""
        return int(self.accelerator.process_index)

    @property
    def processes(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def unwrapped(self) -> PreTrainedModel:
        """The model itself."""
        return cast("PreTrainedModel", self.accelerator.unwrap_model(self.model))

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes. Every process of a group must call it."""
        return self.accelerator.reduce(tensor, reduction="sum") if self.processes > 1 else tensor

    def fewest(self, number: int) -> int:
        """The smallest of all processes' numbers. Every process of a group must call it."""
        return int(self.accelerator.gather(torch.tensor([number], device=self.device)).min())

    def reference_policy(self) -> AbstractContextManager[None]:
        """Have the model be the one that the run started from, without gradients; see `BaseModel`."""
        return self._base.reference_policy(self.deepspeed_engine)

    def batches(self, rows: Sequence[Row]) -> list[Batch]:
        """A batch of these rows, in the parts that are computed together; not yet on the device."""
        return [self._collate([rows[index] for index in part]) for part in self._parts(rows)]

    def placed(self, batch: Batch) -> Batch:
        """The batch on the device, in its own types: accelerate would round a reference's numbers for DeepSpeed."""
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def shared_batches(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], Batch]]:
        """Batches of similar length without gradients in mind, shared out among the processes.

        Yields the indices of a batch's rows, and the batch. Every process gets as many batches as the others (ZeRO-3
        gathers weights in each forward): one that has none left repeats the last, with no indices.
        """
        size = self._rows_at_once
        order = sorted(range(len(rows)), key=lambda index: sum(map(len, rows[index])))
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        for first in range(0, len(groups), self.processes):
            mine = groups[first + self.process] if first + self.process < len(groups) else []
            chosen = [rows[index] for index in mine or groups[-1]]
            for part in self._parts(chosen):
                batch = self.placed(self._collate([chosen[number] for number in part]))
                yield [mine[number] for number in part] if mine else [], batch

    def _parts(self, rows: Sequence[Row]) -> list[list[int]]:
        """The rows of a batch that are computed together, as indices. DeepSpeed counts the backwards of a step."""
        if self.device.type != "cpu" or self.deepspeed_engine is not None or not self._adds_up:
            return [list(range(len(rows)))]
        return parts(list(map(padded_size, rows)), TOKENS_AT_ONCE)
