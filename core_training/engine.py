"""The Engine: one model, one stage, one data set, held in memory and trained in slices.

Central training is this engine run to the end; a federated site and a gossip node are this engine run in slices.
Several engines may share one base model: each parks its trainable state while another uses the parameters.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from core_training.correction import Correction, Start, correction_of
from core_training.data.dataset import Dataset, load_dataset
from core_training.durable import commit_folder, scratch_of
from core_training.errors import DivergedError, ProtocolError, RunError
from core_training.groups.deepspeed_config import deepspeed_config
from core_training.models.base_model import BaseModel
from core_training.models.export import layout_files, write_result
from core_training.models.parameters import read_parameters, write_parameters
from core_training.recipe import Recipe
from core_training.slices import SlicedRun
from core_training.stages.base import BatchLoss, Row, Stage, load_stage
from core_training.state import Manifest, TrainableState
from core_training.trainable import DataReport, EvalReport, TrainReport
from core_training.trainer import StageTrainer

_STATE_FILE = "state.safetensors"
_NOTES_FILE = "notes.json"


class Engine:
    """See `core_training.trainable.Trainable`, which this class fulfils in process."""

    def __init__(self, stage: Stage, dataset: Dataset) -> None:
        self._recipe = stage.recipe
        self._base = stage.base
        self._stage = stage
        self._rows = ReferencedRows(stage.arrange(dataset.rows))
        self._evaluation = {
            source: ReferencedRows(stage.arrange(rows)) for source, rows in sorted(dataset.evaluation.items())
        }
        self.data_report: DataReport = dataset.report
        self.training_sources = dataset.training_sources
        self._parked: TrainableState | None = None
        self._run: SlicedRun | None = None
        self._correction: Correction | None = correction_of(self._recipe)
        self._next_slice = Start.SAME_ROUND
        self._base.initial_state  # noqa: B018 - remembered before any engine on this base trains

    @property
    def manifest(self) -> Manifest:
        return self._base.manifest

    @property
    def initial_state(self) -> TrainableState:
        return self._base.initial_state

    @property
    def initial_digest(self) -> str:
        return self._stage.initial_digest

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

    def write_state(self, state: TrainableState, missed_rounds: bool = False) -> None:
        self._take_model(state)
        self._next_slice = Start.LATER_ROUND if missed_rounds else Start.NEXT_ROUND

    def skip(self, steps: int) -> None:
        self._current.skip(steps)

    def train(self, steps: int, on_step: Callable[[int, int], None] | None = None) -> TrainReport:
        if self.step + steps > self.total_steps:
            raise RunError(f"{steps} steps were asked for after step {self.step} of {self.total_steps}")
        self._take_model()
        trainer = self._current.trainer
        trainer.step_losses.clear()
        before = self.step
        start = time.perf_counter()
        with self._begin_slice(trainer):
            self._current.advance(steps, on_step)
        seconds = time.perf_counter() - start
        report = self._report(trainer.step_losses, before, seconds)
        trainer.step_losses.clear()
        if not math.isfinite(report.loss_mean):
            raise DivergedError(
                f"the training loss is no longer finite at step {self.step}; lower training.learning_rate"
            )
        return report

    def stop(self) -> None:
        self._current.stop()

    def evaluate(self) -> dict[str, EvalReport]:
        """Loss on the held-out examples, by data source. Every process of a group takes its share of the batches."""
        self._take_model()
        trainer = self._current.trainer
        model = trainer.model_wrapped
        model.eval()
        try:
            reports = {source: self._stage.evaluate(trainer, model, rows) for source, rows in self._evaluation.items()}
            return {source: _over_processes(trainer, report) for source, report in reports.items()}
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
                if self._correction is not None:
                    self._correction.save(scratch)
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
        if self._correction is not None:
            self._correction.load(folder, self.manifest)
        return notes

    def reset(self) -> None:
        self._start(self._base.initial_state)

    def save_model(self, folder: Path) -> None:
        """Write an adapter (PEFT layout) or a whole model (transformers layout), with its tokenizer."""
        self._take_model()
        state = read_parameters(self._base.result_parameters, self._deepspeed_engine)
        accelerator = self._current.trainer.accelerator
        if accelerator.is_main_process:
            layout = layout_files(self._base, self._recipe, self._recipe.model.name_or_path)
            write_result(state, layout, folder, self._base.tokenizer)
        accelerator.wait_for_everyone()

    def layout(self, base_name: str) -> dict[str, str]:
        return layout_files(self._base, self._recipe, base_name, without_base=True)

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
        trainer = self._stage.build_trainer(self._rows, arguments)
        self._base.owner = self
        self._run = SlicedRun(trainer, resume_from)
        self._correction = correction_of(self._recipe)
        self._next_slice = Start.SAME_ROUND
        self._ask_reference(trainer)
        write_parameters(self._base.trainable_parameters, state, self._deepspeed_engine)

    def _begin_slice(self, trainer: StageTrainer) -> AbstractContextManager[None]:
        """What a slice's steps are to be taken in."""
        start, self._next_slice = self._next_slice, Start.SAME_ROUND
        if start is not Start.SAME_ROUND and not self._recipe.training.keep_optimizer:
            trainer.forget_moments()
        if self._correction is None:
            return nullcontext()
        return self._correction.during(self._base.trainable_parameters, trainer.optimizer.optimizer, start)

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

    def _ask_reference(self, trainer: StageTrainer) -> None:
        """Have the reference policy give its numbers of every row, once for the whole run."""
        if not self._stage.needs_reference or self._rows.numbers:
            return
        model = trainer.model_wrapped
        model.eval()
        with self._base.reference_policy(self._deepspeed_engine):
            for rows in (self._rows, *self._evaluation.values()):
                rows.numbers = _numbers(self._stage, trainer, model, rows)
        model.train()

    def _report(self, losses: Sequence[BatchLoss], before: int, seconds: float) -> TrainReport:
        """What a slice's batches come to, over all processes; several make a step under gradient accumulation."""
        names = sorted(losses[0].figures)
        table = torch.stack([loss.sums() for loss in losses])  # shape (batches, 3 + 2 figures)
        table = self._current.trainer.accelerator.reduce(table, reduction="sum").cpu()
        per_batch = table[:, 0] / table[:, 1].clamp(min=1)
        sums = table.sum(dim=0).tolist()
        return TrainReport(
            steps=self.step - before,
            loss_first=float(per_batch[0]),
            loss_last=float(per_batch[-1]),
            loss_mean=sums[0] / max(sums[1], 1),
            weight=int(sums[1]),
            tokens=int(sums[2]),
            seconds=seconds,
            figures=_figures(names, sums[3:]),
        )


class ReferencedRows(Sequence[Row]):
    """Rows of one example, with the numbers that the reference policy gave to each once it was asked."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self.numbers: dict[str, list[float]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        row = self._rows[index]
        if not self.numbers:
            return row
        numbers = {name: values[index] for name, values in self.numbers.items()}
        return (dataclasses.replace(row[0], numbers={**row[0].numbers, **numbers}),)


def _numbers(stage: Stage, trainer: StageTrainer, model: Any, rows: Sequence[Row]) -> dict[str, list[float]]:
    """The reference policy's numbers of each row, by name; every process computes a share of them."""
    table: dict[str, torch.Tensor] = {}
    for mine, batch in trainer.shared_batches(rows):
        for name, values in stage.reference(model, batch).items():
            column = table.setdefault(name, torch.zeros(len(rows), device=values.device))
            column[mine] = values.float()[: len(mine)]
    return {name: trainer.accelerator.reduce(column, reduction="sum").tolist() for name, column in table.items()}


def _over_processes(trainer: StageTrainer, report: EvalReport) -> EvalReport:
    """The sum of all processes' reports. Every process of a group must call it."""
    if trainer.accelerator.num_processes == 1:
        return report
    names = sorted(report.figures)
    values = [report.loss_sum, report.weight, report.examples, *(v for n in names for v in report.figures[n])]
    sums = torch.tensor(values, dtype=torch.float64, device=trainer.args.device)
    loss_sum, weight, examples, *rest = trainer.accelerator.reduce(sums, reduction="sum").tolist()
    return EvalReport(loss_sum, int(weight), int(examples), _figures(names, rest))


def _figures(names: Sequence[str], values: Sequence[float]) -> dict[str, tuple[float, int]]:
    """Sums and counts by name, from one after another."""
    return {name: (total, int(count)) for name, total, count in zip(names, values[::2], values[1::2], strict=True)}


def read_checkpoint(folder: Path, manifest: Manifest) -> tuple[TrainableState, dict[str, Any]]:
    """State and notes of a checkpoint. Raises RunError when it is damaged or has another manifest."""
    try:
        state = TrainableState.from_bytes((folder / _STATE_FILE).read_bytes(), manifest)
        return state, json.loads((folder / _NOTES_FILE).read_text())
    except (OSError, ValueError, ProtocolError) as error:
        raise RunError(f"{folder}: not a checkpoint of this run: {error}") from None


def open_engine(recipe: Recipe) -> Engine:
    """Load the base model and the data of `recipe`, and build its engine."""
    stage = load_stage(recipe, BaseModel(recipe))
    return Engine(stage, load_dataset(recipe, stage))


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
        # A bfloat16 model sees to its own autocast (`models.precision`); DeepSpeed insists on being told by both.
        "bf16": recipe.model.dtype == "bfloat16" and recipe.deepspeed.used,
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
