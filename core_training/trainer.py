"""The one trainer of all stages: a Hugging Face trainer whose loss is the stage's, normalised over the whole step.

TRL's trainers are what the losses are held against (docs/decisions/014): a trainer here must be paused between two
steps, share its model with other trainers, and divide a step's loss by all that entered it, at every site.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainingArguments

from core_training.data.rows import Collator, padded_size, parts
from core_training.groups.even_batches import EvenBatches
from core_training.models.heads import innermost
from core_training.stages.base import BatchLoss, Row

if TYPE_CHECKING:
    from core_training.stages.base import Stage


_TOKENS_AT_ONCE = 1024
"""A CPU is no faster with more, and what a forward keeps for its backward soon outgrows a small model."""


class StageTrainer(Trainer):  # type: ignore[misc]
    """Trains a stage's model on its rows, and keeps what each batch's loss was.

    On a CPU, a batch is computed in parts of similar length, whose gradients add up to the batch's.
    The engine keeps the trainable state itself (one format for every tuning mode), so the trainer's own checkpoint
    holds optimizer, schedule, random numbers and progress only.
    """

    def __init__(self, stage: Stage, rows: Sequence[Row], arguments: dict[str, Any]) -> None:
        model = stage.base.model
        self.stage = stage
        self.collate = Collator(stage.base.tokenizer.pad_token_id)
        # For checkpointed layers, transformers hooks into the embeddings in each run: one of the many is enough.
        innermost(model).disable_input_require_grads()
        super().__init__(
            model=model,
            args=TrainingArguments(**arguments, remove_unused_columns=False),
            train_dataset=rows,
            data_collator=lambda rows: [self.collate([rows[index] for index in part]) for part in self._parts(rows)],
        )
        self.model_accepts_loss_kwargs = True  # the loss is divided by `num_items_in_batch` here
        self.step_losses: list[BatchLoss] = []
        """The loss of every batch since the slice began."""

    def _parts(self, rows: Sequence[Row]) -> list[list[int]]:
        """The rows of a batch that are computed together, as indices. DeepSpeed counts the backwards of a step."""
        if self.args.device.type != "cpu" or self.is_deepspeed_enabled or not self.stage.adds_up:
            return [list(range(len(rows)))]
        return parts(list(map(padded_size, rows)), _TOKENS_AT_ONCE)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        before = len(self.step_losses)
        losses = [super(StageTrainer, self).training_step(model, part, num_items_in_batch) for part in inputs]
        self.step_losses[before:] = [reduce(add, self.step_losses[before:])]
        return torch.stack(losses).sum()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        loss = self.stage.loss(model, inputs)
        self.step_losses.append(loss.detached())
        # num_items_in_batch counts the units of all processes, and gradients are averaged over the processes.
        units = torch.as_tensor(loss.weight if num_items_in_batch is None else num_items_in_batch)
        return loss.total / units.clamp(min=1) * self.accelerator.num_processes

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        if self.accelerator.num_processes > 1:
            shard = loader.batch_sampler
            shard.batch_sampler = EvenBatches(shard.batch_sampler, self.accelerator.num_processes)
            shard.even_batches = False
        return loader

    def forget_moments(self) -> None:
        """Set the optimizer back to how it was before its first step; learning rate and schedule go on."""
        optimizer = self.optimizer
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper, and DeepSpeed's inside it
            optimizer = optimizer.optimizer
        for state in optimizer.state.values():
            for name, value in state.items():
                # In place, as DeepSpeed keeps other names for the same tensors.
                state[name] = value.zero_() if torch.is_tensor(value) else 0

    def _prepare_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch on the device, in its own types: transformers would round a reference's numbers for DeepSpeed."""
        return {name: tensor.to(self.args.device) for name, tensor in inputs.items()}

    def shared_batches(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """Batches of similar length without gradients in mind, shared out among the processes.

        Yields the indices of a batch's rows, and the batch. Every process gets as many batches as the others (ZeRO-3
        gathers weights in each forward): one that has none left repeats the last, with no indices.
        """
        size = self.stage.recipe.training.per_device_eval_batch_size
        order = sorted(range(len(rows)), key=lambda index: sum(map(len, rows[index])))
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        for first in range(0, len(groups), world):
            mine = groups[first + rank] if first + rank < len(groups) else []
            chosen = [rows[index] for index in mine or groups[-1]]
            for part in self._parts(chosen):
                batch = self._prepare_inputs(self.collate([chosen[number] for number in part]))
                yield [mine[number] for number in part] if mine else [], batch

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        units = sum(self.stage.weight(part) for batch in batch_samples for part in batch)
        if not torch.is_tensor(units):
            return None
        return self.accelerator.reduce(units.to(device), reduction="sum")  # type: ignore[no-any-return]

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: see the class."""

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: see the class."""

    def floating_point_ops(self, *args: Any, **kwargs: Any) -> int:
        """Nothing: counting them walks through all parameters at every step, and nobody reads the sum."""
        return 0

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: a checkpoint is not a published model."""
