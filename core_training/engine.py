"""The Engine: one model, one stage, one data set, held in memory and trained in slices.

Central training is this engine run to the end; a federated site and a gossip node are this engine run in slices.
Several engines may share one base model: each parks its trainable state while another uses the parameters.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset as ArrowDataset

from core_training.base_model import BaseModel
from core_training.dataset import Dataset, load_dataset
from core_training.deepspeed_config import deepspeed_config
from core_training.durable import commit_folder, scratch_of
from core_training.errors import ProtocolError, RunError
from core_training.export import layout_files, write_result
from core_training.parameters import read_parameters, write_parameters
from core_training.recipe import Recipe
from core_training.rows import Collator, row_of
from core_training.slices import SlicedRun
from core_training.stages import STAGES
from core_training.state import Manifest, TrainableState
from core_training.trainable import NOTHING_EVALUATED, DataReport, EvalReport, TrainReport

_STATE_FILE = "state.safetensors"
_NOTES_FILE = "notes.json"


class Engine:
    """See `core_training.trainable.Trainable`, which this class fulfils in process."""

    def __init__(self, recipe: Recipe, base: BaseModel, dataset: Dataset) -> None:
        self._recipe = recipe
        self._base = base
        self._stage = import_module(STAGES[recipe.stage])
        self._collate = Collator(base.tokenizer.pad_token_id)
        self._evaluation = dataset.evaluation
        self._rows = ArrowDataset.from_list(dataset.rows)
        self.data_report: DataReport = dataset.report
        self.training_sources = dataset.training_sources
        self._parked: TrainableState | None = None
        self._run: SlicedRun | None = None
        base.initial_state  # noqa: B018 - remembered before any engine on this base trains

    @property
    def manifest(self) -> Manifest:
        return self._base.manifest

    @property
    def initial_state(self) -> TrainableState:
        return self._base.initial_state

    @property
    def initial_digest(self) -> str:
        return self._base.initial_digest

    @property
    def step(self) -> int:
        return self._current.step

    @property
    def total_steps(self) -> int:
        return self._current.total_steps

    def read_state(self) -> TrainableState:
        """A copy of the trainable state."""
        if self._base.owner is not self and self._parked is not None:
            return self._parked
        self._take_model()
        return read_parameters(self._base.trainable_parameters, self._deepspeed_engine)

    def write_state(self, state: TrainableState) -> None:
        """Put `state` in place of the trainable parameters. Optimizer moments stay."""
        self._take_model(state)

    def train(self, steps: int, on_step: Callable[[int, int], None] | None = None) -> TrainReport:
        if self.step + steps > self.total_steps:
            raise RunError(f"{steps} steps were asked for after step {self.step} of {self.total_steps}")
        self._take_model()
        trainer = self._current.trainer
        trainer.step_losses.clear()
        before = self.step
        start = time.perf_counter()
        self._current.advance(steps, on_step)
        seconds = time.perf_counter() - start
        # Shape (batches, 2): loss sum and loss tokens; several batches make a step under gradient accumulation.
        batches = torch.stack([torch.stack([loss.double(), tokens.double()]) for loss, tokens in trainer.step_losses])
        batches = trainer.accelerator.reduce(batches, reduction="sum").cpu()
        trainer.step_losses.clear()
        per_batch = batches[:, 0] / batches[:, 1].clamp(min=1)
        mean = float(batches[:, 0].sum() / batches[:, 1].sum().clamp(min=1))
        if not math.isfinite(mean):
            raise RunError(f"the training loss is no longer finite at step {self.step}; lower training.learning_rate")
        return TrainReport(
            steps=self.step - before,
            loss_first=float(per_batch[0]),
            loss_last=float(per_batch[-1]),
            loss_mean=mean,
            loss_tokens=int(batches[:, 1].sum()),
            seconds=seconds,
        )

    def stop(self) -> None:
        self._current.stop()

    def evaluate(self) -> dict[str, EvalReport]:
        """Loss on the held-out examples, by data source. Every process of a group takes its share of the batches."""
        self._take_model()
        trainer = self._current.trainer
        model = trainer.model_wrapped
        model.eval()
        try:
            return {source: self._evaluate(model, trainer, source) for source in sorted(self._evaluation)}
        finally:
            model.train()

    def checkpoint(self, folder: Path, notes: Mapping[str, Any] | None = None) -> None:
        """Write all that is needed to go on from here into `folder`, whole or not at all. Raises RunError."""
        self._take_model()
        state = self.read_state()
        accelerator = self._current.trainer.accelerator
        if accelerator.is_main_process:
            with commit_folder(folder) as scratch:
                (scratch / _STATE_FILE).write_bytes(state.to_bytes())
                (scratch / _NOTES_FILE).write_text(json.dumps(dict(notes or {})))
                accelerator.wait_for_everyone()
                self._current.save(scratch / "trainer")
        else:
            accelerator.wait_for_everyone()
            self._current.save(scratch_of(folder) / "trainer")
        accelerator.wait_for_everyone()

    def restore(self, folder: Path) -> dict[str, Any]:
        """Go back to what `checkpoint` wrote. Raises RunError when it belongs to another model or recipe."""
        state, notes = read_checkpoint(folder, self.manifest)
        self._start(state, resume_from=str(folder / "trainer"))
        return notes

    def reset(self) -> None:
        self._start(self._base.initial_state)

    def save_model(self, folder: Path) -> None:
        """Write an adapter (PEFT layout) or a whole model (transformers layout), with its tokenizer."""
        state = self.read_state()
        accelerator = self._current.trainer.accelerator
        if accelerator.is_main_process:
            write_result(state, self.layout(), folder, self._base.tokenizer)
        accelerator.wait_for_everyone()

    def layout(self, base_name: str | None = None) -> dict[str, str]:
        return layout_files(self._base.model, base_name or self._recipe.model.name_or_path)

    def close(self) -> None:
        if self._run is not None:
            self._run.close()
            self._run = None
        if self._base.owner is self:
            self._base.owner = None

    def launch(self) -> None:
        """Build the trainer now rather than at its first use (a DeepSpeed group must do so on every rank at once)."""
        if self._run is None:
            self._start(self._base.initial_state)

    @property
    def _current(self) -> SlicedRun:
        self.launch()
        assert self._run is not None
        return self._run

    @property
    def _deepspeed_engine(self) -> Any:
        return getattr(self._run.trainer, "deepspeed", None) if self._run is not None else None

    def _start(self, state: TrainableState, resume_from: str | None = None) -> None:
        """Build the trainer and bring it to just before its next step, with `state` in the parameters."""
        self._park_owner()
        if self._run is not None:
            self._run.close()
        arguments = training_arguments(self._recipe)
        trainer = self._stage.build_trainer(self._recipe, self._base, self._rows, arguments)
        self._base.owner = self
        self._run = SlicedRun(trainer, resume_from)
        write_parameters(self._base.trainable_parameters, state, self._deepspeed_engine)

    def _take_model(self, state: TrainableState | None = None) -> None:
        """Make the shared parameters this engine's own, holding `state` or what they held when it last had them."""
        self.launch()
        if self._base.owner is not self:
            self._park_owner()
            self._base.owner = self
            state = state or self._parked
            self._parked = None
        if state is not None:
            write_parameters(self._base.trainable_parameters, state, self._deepspeed_engine)

    def _park_owner(self) -> None:
        owner = self._base.owner
        if owner is not None and owner is not self:
            owner._parked = read_parameters(self._base.trainable_parameters)
        self._base.owner = None

    def _evaluate(self, model: Any, trainer: Any, source: str) -> EvalReport:
        examples = sorted(self._evaluation[source], key=lambda example: len(example.input_ids))
        size = self._recipe.training.per_device_eval_batch_size
        batches = [examples[i : i + size] for i in range(0, len(examples), size)]
        rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
        total = NOTHING_EVALUATED
        for first in range(0, len(batches), world):
            # Every process runs every forward (ZeRO-3 gathers weights in it); one without a batch repeats and drops it.
            index = first + rank
            batch = self._collate([row_of([example]) for example in batches[min(index, len(batches) - 1)]])
            report = self._stage.evaluate(model, {k: v.to(trainer.args.device) for k, v in batch.items()})
            if index < len(batches):
                total = total + report
        if world == 1:
            return total
        sums = torch.tensor(
            [total.loss_sum, total.tokens, total.correct_tokens, total.exact_matches, total.examples],
            dtype=torch.float64, device=trainer.args.device,
        )  # fmt: skip
        loss_sum, *counts = trainer.accelerator.reduce(sums, reduction="sum").tolist()
        return EvalReport(loss_sum, *(int(count) for count in counts))


def read_checkpoint(folder: Path, manifest: Manifest) -> tuple[TrainableState, dict[str, Any]]:
    """State and notes of a checkpoint. Raises RunError when it is damaged or has another manifest."""
    try:
        state = TrainableState.from_bytes((folder / _STATE_FILE).read_bytes(), manifest)
        return state, json.loads((folder / _NOTES_FILE).read_text())
    except (OSError, ValueError, ProtocolError) as error:
        raise RunError(f"{folder}: not a checkpoint of this run: {error}") from None


def open_engine(recipe: Recipe) -> Engine:
    """Load the base model and the data of `recipe`, and build its engine."""
    base = BaseModel(recipe)
    return Engine(recipe, base, load_dataset(recipe, base))


def training_arguments(recipe: Recipe) -> dict[str, Any]:
    """The recipe's training section as Hugging Face `TrainingArguments` (saving, logging and hub switched off)."""
    training = recipe.training
    return {
        "output_dir": tempfile.gettempdir(),  # nothing is written there: `SlicedRun.save` names its own folder
        "learning_rate": recipe.learning_rate,
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "max_steps": recipe.total_steps or -1,
        "num_train_epochs": training.num_train_epochs,
        "seed": training.seed,
        "optim": training.optim,
        "lr_scheduler_type": training.lr_scheduler_type,
        "warmup_steps": training.warmup_steps,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "gradient_checkpointing": training.gradient_checkpointing,
        # A bfloat16 model needs no autocast, except that DeepSpeed insists on being told by both.
        "bf16": recipe.model.dtype == "bfloat16" and recipe.deepspeed.processes > 1,
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "deepspeed": deepspeed_config(recipe),
    }
