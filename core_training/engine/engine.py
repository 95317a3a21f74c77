"""The Engine: one model, one stage, one data set, held in memory and trained in slices.

Central training is this engine run to the end; a federated site and a gossip node are this engine run in slices.
Several engines may share one base model: each parks its trainable state while another uses the parameters.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from core_training.foundation.strict_json import strict_json

import core_training.foundation.environment  # noqa: F401  # isort: skip - before PyTorch is imported
import torch

from core_training.data.examples import Row
from core_training.engine.correction import Correction, FedProx, Start, correction_of
from core_training.engine.dataset import Dataset, load_dataset
from core_training.engine.deepspeed_config import check_rounds
from core_training.engine.failures import explained
from core_training.engine.partial_training import only
from core_training.engine.private_steps import check_private
from core_training.engine.step_loop import StepLoop, read_progress
from core_training.engine.timed_round import TimedRound
from core_training.foundation.durable import commit_folder, scratch_of
from core_training.foundation.errors import DivergedError, FedloomError, RunError
from core_training.foundation.state import Manifest, TrainableState
from core_training.foundation.trainable import (
    WHOLE,
    DataReport,
    EvalReport,
    OnFigures,
    TrainedPart,
    TrainReport,
    figures_of,
)
from core_training.models.base_model import BaseModel
from core_training.models.export import layout_files
from core_training.models.parameters import read_parameters, write_parameters
from core_training.models.prepared_model import PreparedModel
from core_training.models.probe import check_written
from core_training.models.results import trained_state
from core_training.recipe.pace import at_its_pace
from core_training.recipe.schema import Recipe
from core_training.runs.checkpoints import NOTES_FILE, STATE_FILE, read_checkpoint
from core_training.runs.finished_run import Result
from core_training.runs.result_format import MODEL_CONFIG, write_result
from core_training.stages.base import Stage, load_stage

_log = logging.getLogger(__name__)

_LOOP_FOLDER = "loop"


class Engine:
    """See `core_training.foundation.trainable.Trainable`, which this class fulfils in process."""

    def __init__(self, stage: Stage[Any], dataset: Dataset) -> None:
        self._dataset = dataset
        self._rows = ReferencedRows(stage.arrange(dataset.rows))
        self._stage = stage = _at_its_pace(stage, len(self._rows))
        self._recipe = stage.recipe
        self._base = stage.base
        self._evaluation = {
            source: ReferencedRows(stage.arrange(rows)) for source, rows in sorted(dataset.evaluation.items())
        }
        self.data_report: DataReport = dataset.report
        self.training_sources = dataset.training_sources
        self._parked: TrainableState | None = None
        self._loop: StepLoop | None = None
        self._salvaged: list[TrainReport] = []
        self._is_lost = False
        self._has_told = False
        check_rounds(self._recipe)
        check_private(self._recipe)
        self._pull = 0.0
        self._correction: Correction | None = correction_of(self._recipe)
        self._next_slice, self._part, self._left_out = Start.SAME_ROUND, WHOLE, False
        self._base.initial_state  # noqa: B018 - remembered before any engine on this base trains

    @property
    def recipe(self) -> Recipe:
        return self._recipe

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

    def write_state(self, state: TrainableState) -> None:
        self._take_model(state)

    def begin_round(
        self,
        state: TrainableState,
        *,
        missed_rounds: bool = False,
        left_out: bool = False,
        part: TrainedPart = WHOLE,
    ) -> None:
        self.write_state(state)
        self._part, self._left_out = part, left_out
        self._next_slice = Start.LATER_ROUND if missed_rounds else Start.NEXT_ROUND

    def skip(self, steps: int) -> None:
        self._current.skip(steps)

    def train(
        self, steps: int, on_step: Callable[[int, int], None] | None = None, on_figures: OnFigures | None = None
    ) -> TrainReport:
        loop = self._current
        if steps > loop.steps_left:
            raise RunError(f"{steps} steps were asked for after step {loop.step} of {loop.total_steps}")
        self._salvaged = []
        start = time.perf_counter()
        try:
            with explained(f"training after step {loop.step}", self._recipe):
                self._take_model()
                with self._slice(loop):
                    self._advance(loop, steps, on_step, on_figures)
                report = loop.ledger.report(time.perf_counter() - start)
                self._tell_changed_buffers()
                return report
        except FedloomError as error:
            self._is_lost = not loop.is_whole or (isinstance(error, RunError) and error.process_is_lost)
            if not self._is_lost and loop.ledger.steps and self._deepspeed_engine is None:
                self._salvaged = [loop.ledger.report(time.perf_counter() - start)]
            raise

    def _advance(
        self,
        loop: StepLoop,
        steps: int,
        on_step: Callable[[int, int], None] | None,
        on_figures: OnFigures | None,
    ) -> None:
        """Take so many steps, or as many as there is time for."""
        if (seconds := self._recipe.topology.local_seconds) is None or self._recipe.topology.kind == "central":
            loop.advance(steps, on_step, on_figures)
            return
        round_ = TimedRound(loop, seconds, on_step)
        loop.advance(steps, round_.after_step, on_figures)
        round_.end()
        if on_figures is not None and loop.step % self._recipe.training.logging_steps:
            on_figures(loop.ledger.figures(loop.step))  # nobody knows beforehand which step is the run's last

    def salvage(self) -> list[TrainReport] | None:
        reports, self._salvaged = self._salvaged, []
        return None if self._is_lost else reports

    def stop(self) -> None:
        if self._loop is not None:  # a signal may come before there is one
            self._loop.stop()

    def evaluate(self) -> dict[str, EvalReport]:
        """Loss on the held-out examples, by data source. Every process of a group takes its share of the batches."""
        with explained(f"the evaluation after step {self._current.step}", self._recipe):
            self._take_model()
            prepared = self._current.prepared
            prepared.model.eval()
            try:
                reports = {source: self._stage.evaluate(prepared, rows) for source, rows in self._evaluation.items()}
                reports = {source: _over_processes(prepared, report) for source, report in reports.items()}
            finally:
                prepared.model.train()
        if not all(math.isfinite(report.loss_sum) for report in reports.values()):
            raise DivergedError(
                f"the evaluation's loss is no longer finite after step {self.step}; lower training.learning_rate"
            )
        return reports

    def checkpoint(self, folder: Path, notes: Mapping[str, Any] | None = None) -> None:
        """Write all that is needed to go on from here into `folder`, whole or not at all. Raises RunError."""
        with explained("saving a checkpoint", self._recipe):
            self._write_checkpoint(folder, notes)

    def _write_checkpoint(self, folder: Path, notes: Mapping[str, Any] | None) -> None:
        self._take_model()
        state = self.read_state()
        accelerator = self._current.prepared.accelerator
        if accelerator.is_main_process:
            with commit_folder(folder) as scratch:
                state.write(scratch / STATE_FILE)
                (scratch / NOTES_FILE).write_text(strict_json(dict(notes or {})))
                if self._correction is not None:
                    self._correction.save(scratch)
                accelerator.wait_for_everyone()
                self._current.save(scratch / _LOOP_FOLDER)
                accelerator.wait_for_everyone()
        else:
            accelerator.wait_for_everyone()
            self._current.save(scratch_of(folder) / _LOOP_FOLDER)
            accelerator.wait_for_everyone()
        accelerator.wait_for_everyone()

    def check_checkpoint(self, folder: Path) -> None:
        """Raise RunError where `restore` would, before this process and others do anything together."""
        read_checkpoint(folder, self.manifest)
        read_progress(folder / _LOOP_FOLDER)

    def restore(self, folder: Path) -> dict[str, Any]:
        """Go back to what `checkpoint` wrote. Raises RunError when it belongs to another model or recipe."""
        state, notes = read_checkpoint(folder, self.manifest)
        self._start(state, folder / _LOOP_FOLDER)
        if self._correction is not None:
            self._correction.load(folder, self.manifest)
        return notes

    def reset(self) -> None:
        self._start(self._base.initial_state)

    def save_model(self, folder: Path) -> None:
        """Write an adapter (PEFT layout) or a whole model (transformers layout), with its tokenizer."""
        self._take_model()
        state = read_parameters(self._base.result_parameters, self._deepspeed_engine)
        accelerator = self._current.prepared.accelerator
        if accelerator.is_main_process:
            layout = layout_files(self._base, self._recipe, self._recipe.model.name_or_path)
            write_result(state, layout, folder, self._base.tokenizer)
            if MODEL_CONFIG in layout and self._deepspeed_engine is None:
                check_written(self._base.model, folder)
        accelerator.wait_for_everyone()

    def layout(self, base_name: str) -> dict[str, str]:
        return layout_files(self._base, self._recipe, base_name, without_base=True)

    def alone(self, steps: int, learning_rate: float | None = None, pull: float = 0.0) -> Engine:
        engine = Engine(load_stage(self._recipe.alone(steps, learning_rate), self._base), self._dataset)
        engine._pull = pull
        return engine

    def close(self) -> None:
        self._loop = None
        if self._base.owner is self:
            self._base.owner = None

    def launch(self) -> None:
        """Prepare the model now rather than at its first use (a DeepSpeed group must do so on every rank at once)."""
        if self._loop is None:
            self._start(self._base.initial_state)

    @property
    def _current(self) -> StepLoop:
        self.launch()
        assert self._loop is not None
        return self._loop

    @property
    def _deepspeed_engine(self) -> Any:
        return self._loop.prepared.deepspeed_engine if self._loop is not None else None

    def _start(self, state: TrainableState, resume_from: Path | None = None) -> None:
        """Make a new loop and bring it to just before its next step, with `state` in the parameters."""
        self._park_owner()
        self._loop, self._is_lost = None, False
        self._base.owner = self
        with explained("preparing the model", self._recipe):
            loop = self._loop = StepLoop(self._stage, self._rows, self._dataset.units)
            if resume_from is not None:
                loop.load(resume_from)
            self._correction = FedProx(self._pull) if self._pull else correction_of(self._recipe)
            self._next_slice, self._part, self._left_out = Start.SAME_ROUND, WHOLE, False
            self._ask_reference(loop.prepared)
            write_parameters(self._base.trainable_parameters, state, self._deepspeed_engine)

    @contextmanager
    def _slice(self, loop: StepLoop) -> Iterator[None]:
        """Have every step of a slice corrected, change what it may, and start without moments if the recipe says so."""
        start, self._next_slice = self._next_slice, Start.SAME_ROUND
        if start is not Start.SAME_ROUND and not self._recipe.training.keep_optimizer:
            loop.forget_moments()
        parameters = self._base.trainable_parameters
        with ExitStack() as within:
            if self._correction is not None:
                within.enter_context(
                    self._correction.during(parameters, loop.optimizer, start, left_out=self._left_out)
                )
            if not self._part.is_whole:
                within.enter_context(only(parameters, loop.optimizer, self._part))
            yield

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

    def _ask_reference(self, prepared: PreparedModel) -> None:
        """Have the reference policy give its numbers of every row, once for the whole run."""
        if not self._stage.needs_reference or self._rows.numbers:
            return
        prepared.model.eval()
        with prepared.reference_policy():
            for rows in (self._rows, *self._evaluation.values()):
                rows.numbers = _numbers(self._stage, prepared, rows)
        prepared.model.train()

    def _tell_changed_buffers(self) -> None:
        if not self._has_told and (changed := self._base.changed_buffers()):
            self._has_told = True
            alone = "" if self._recipe.topology.kind == "central" else ", and what they became stays here"
            _log.warning(
                "training changes %d buffers of the model, such as %s: they are no part of the trained state%s",
                len(changed),
                changed[0],
                alone,
            )


def _at_its_pace(stage: Stage[Any], rows: int) -> Stage[Any]:
    """The stage with the steps that its recipe's passes over so many rows come to; others may share the one given."""
    if (recipe := at_its_pace(stage.recipe, rows)) is stage.recipe:
        return stage
    own = copy.copy(stage)
    own.recipe = recipe
    return own


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


def _numbers(stage: Stage[Any], prepared: PreparedModel, rows: Sequence[Row]) -> dict[str, list[float]]:
    """The reference policy's numbers of each row, by name; every process computes a share of them."""
    table: dict[str, torch.Tensor] = {}
    for mine, batch in prepared.shared_batches(rows):
        for name, values in stage.reference(prepared.model, batch).items():
            column = table.setdefault(name, torch.zeros(len(rows), device=values.device))
            column[mine] = values.float()[: len(mine)]
    return {name: prepared.total(column).tolist() for name, column in table.items()}


def _over_processes(prepared: PreparedModel, report: EvalReport) -> EvalReport:
    """The sum of all processes' reports. Every process of a group must call it."""
    if prepared.processes == 1:
        return report
    names = sorted(report.figures)
    values = [report.loss_sum, report.weight, report.examples, *(v for n in names for v in report.figures[n])]
    sums = torch.tensor(values, dtype=torch.float64, device=prepared.device)
    loss_sum, weight, examples, *rest = prepared.total(sums).tolist()
    return EvalReport(loss_sum, int(weight), int(examples), figures_of(names, rest))


def open_engine(recipe: Recipe) -> Engine:
    """Load the base model and the data of `recipe`, and build its engine."""
    return Engine(*_loaded(recipe))


def _loaded(recipe: Recipe) -> tuple[Stage[Any], Dataset]:
    with explained("loading the model and its data", recipe):
        stage = load_stage(recipe, BaseModel(recipe))
        return stage, load_dataset(recipe, stage)


def evaluation_of(result: Result, data: str | list[str] | None) -> dict[str, EvalReport]:
    """The evaluation of a finished run's result on the records that its recipe holds out, or on all of some files.

    Raises InputError when the result is not of this model, and for records that do not fit the stage.
    """
    recipe = result.recipe
    if data is not None:
        recipe = recipe.model_copy(
            update={
                "data": recipe.data.model_copy(update={"train": data, "eval": None, "eval_fraction": 0.0}),
                "training": recipe.training.model_copy(update={"packing": False}),
            }
        )
    stage, records = _loaded(recipe)
    if data is not None:
        records = replace(records, evaluation={"data": records.rows})
    engine = Engine(stage, records)
    try:
        engine.write_state(trained_state(result, stage.base))
        return engine.evaluate()
    finally:
        engine.close()
