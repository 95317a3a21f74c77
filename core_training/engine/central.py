"""Central training: one engine run to the end, with checkpoints, evaluations and an orderly stop on a signal."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core_training.foundation.errors import FedloomError, InputError, Interrupted, RunError
from core_training.foundation.stopping import StopRequest, stopping_when_ready
from core_training.foundation.trainable import EVAL_REPORT, StepFigures, Trainable, TrainReport, means, total
from core_training.privacy.ledger import LEDGER_FILE, PrivacyLedger
from core_training.privacy.mechanism import RecordMechanism
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.checkpoints import keep_best, prune_best, prune_checkpoints, read_best
from core_training.runs.figures import RunFigures
from core_training.runs.result_format import result_name
from core_training.runs.run_folder import RunFolder, SiteSummary, Summary
from core_training.runs.trackers import reporting

Evaluation = dict[str, dict[str, Any]]
"""The report of each source of records, as JSON has it."""


def train(
    recipe: Recipe,
    engine: Trainable,
    folder: RunFolder,
    on_step: Callable[[int, int], None] = lambda *_: None,
    *,
    resume: bool = False,
    heeds_signals: bool = True,
) -> Summary:
    """Train to the end and write the run folder. `on_step(step, total)` is called after each step.

    Raises Interrupted, with everything saved, after one of the signals in `STOPS`, and StopNow after a second; without
    `heeds_signals` these are left alone.
    """
    # The running step ends before anything is saved.
    heeding = stopping_when_ready(lambda _: engine.stop()) if heeds_signals else nullcontext(StopRequest())
    with heeding as stopped:
        return _CentralRun(recipe, engine, folder, on_step, stopped).to_the_end(resume=resume)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest committed checkpoint, or None."""
    return max(folder.glob("step-*"), default=None)


class _CentralRun:
    """One engine's way to the end of its run, with what is written down of it."""

    def __init__(
        self,
        recipe: Recipe,
        engine: Trainable,
        folder: RunFolder,
        on_step: Callable[[int, int], None],
        stopped: StopRequest,
    ) -> None:
        self._recipe = recipe
        self._engine = engine
        self._folder = folder
        self._on_step = on_step
        self._stopped = stopped
        self._progress = RunFigures()
        self._evaluation: Evaluation = {}
        """That of the step at which the run stands, once it was made."""

    def to_the_end(self, *, resume: bool) -> Summary:
        self._start_or_resume(resume=resume)
        with reporting(self._recipe, self._folder, self._engine.step):
            return self._go_on()

    def _go_on(self) -> Summary:
        self._began = time.perf_counter() - self._progress.seconds_total
        try:
            self._evaluate_if_due()
            while not self._has_ended():
                self._leave_if_stopped()
                self._train()
                self._leave_if_stopped()
                if self._engine.step % self._recipe.training.save_steps == 0 or self._is_last_step:
                    self._checkpoint()
                self._evaluate_if_due()
            if not self._evaluation:  # it was made before an interruption
                self._evaluate()
        except RunError as error:
            self._progress.seconds_total = time.perf_counter() - self._began
            raise self._failed(error) from error
        self._leave_if_stopped()
        return self._conclude()

    @property
    def _is_last_step(self) -> bool:
        return self._engine.step == self._engine.total_steps

    @property
    def _interval(self) -> int:
        """Steps between two evaluations."""
        training, topology = self._recipe.training, self._recipe.topology
        return training.eval_steps or (topology.local_steps or training.save_steps) * topology.eval_every

    def _start_or_resume(self, *, resume: bool) -> None:
        last = latest_checkpoint(self._folder.checkpoints) if resume else None
        engine = self._engine
        if self._recipe.judges_by_held_out is not None and engine.data_report.eval_examples == 0:
            raise InputError(
                f"{self._recipe.judges_by_held_out}: none of the records is held out to judge by; raise "
                "data.eval_fraction, or give data.eval"
            )
        if last is None:
            self._folder.event(events.CentralStarted(total_steps=engine.total_steps, **asdict(engine.data_report)))
            return
        self._progress = RunFigures.from_json(engine.restore(last))
        self._folder.event(events.ResumedAtStep(step=engine.step))
        if engine.step > engine.total_steps:
            raise InputError(
                f"{self._folder.path}: step {engine.step} is behind this run, and its recipe ends at "
                f"{engine.total_steps}; give more steps"
            )

    def _has_ended(self) -> bool:
        if self._is_last_step:
            return True
        if not self._progress.has_lost_patience(self._recipe.topology.early_stopping_patience):
            return False
        self._folder.event(events.StoppedEarlyAtStep(step=self._engine.step))
        if latest_checkpoint(self._folder.checkpoints) != self._checkpoint_folder:
            self._checkpoint()
        return True

    def _train(self) -> None:
        """Train until something else is due."""
        engine, training = self._engine, self._recipe.training
        reported = self._recipe.topology.local_steps or training.save_steps
        until = min(_next_multiple(engine.step, n) for n in (self._interval, reported, training.save_steps))
        steps = min(until, engine.total_steps) - engine.step
        self._note(engine.train(steps, self._on_step, self._log))
        self._progress.seconds_total = time.perf_counter() - self._began

    def _log(self, figures: StepFigures) -> None:
        self._folder.event(events.StepsLogged.of(figures))

    def _note(self, report: TrainReport) -> None:
        self._progress.trained(report)
        loss, step = report.loss_mean, self._engine.step
        self._folder.event(
            events.StepsTrained(step=step, loss=loss, weight=report.weight, figures=means(report.figures))
        )

    def _evaluate_if_due(self) -> None:
        """Evaluate before the first step, after the last, and at each interval; once, also after a resume."""
        step = self._engine.step
        if not (self._is_last_step or step % self._interval == 0) or self._progress.evaluated_at == step:
            return
        is_best = self._progress.evaluated(self._evaluate(), step)
        if is_best and self._recipe.training.load_best_model_at_end:
            notes = {"evaluation": self._evaluation}
            keep_best(self._folder.checkpoints, step, self._engine.read_state(), notes)

    def _evaluate(self) -> float | None:
        """Evaluate and tell it; returns the loss."""
        reports = self._engine.evaluate()
        loss = total(reports).loss
        self._evaluation = {source: asdict(report) for source, report in reports.items()}
        self._folder.event(events.Evaluated(step=self._engine.step, loss=loss, evaluation=self._evaluation))
        return loss

    @property
    def _checkpoint_folder(self) -> Path:
        return self._folder.checkpoints / f"step-{self._engine.step:08d}"

    def _checkpoint(self) -> None:
        self._engine.checkpoint(self._checkpoint_folder, self._progress.to_json())
        prune_checkpoints(self._folder.checkpoints, "step-*")
        prune_best(self._folder.checkpoints, self._progress.best_at)

    def _leave_if_stopped(self) -> None:
        """Save and stop, once a signal has come."""
        if self._stopped.number is not None:
            self._checkpoint()
            step = self._engine.step
            self._folder.event(events.Interrupted(step=step))
            raise Interrupted(
                f"interrupted at step {step} of {self._engine.total_steps}, saved in {self._folder.path}; "
                "--resume goes on",
                self._stopped.number,
            )

    def _failed(self, error: RunError) -> RunError:
        """Save the steps before the one that failed, if they are there to be saved; return what to say."""
        reports = self._engine.salvage()
        # What made a step fail may make what follows fail too, a full disk for one; it is the step that is told.
        for report in reports or []:
            with suppress(FedloomError):
                self._note(report)
        if reports is not None:
            with suppress(FedloomError):
                self._checkpoint()
        saved = latest_checkpoint(self._folder.checkpoints)
        what = (
            f"step {int(saved.name.removeprefix('step-'))} is saved in {self._folder.path}; --resume goes on from it"
            if saved
            else "no step was saved"
        )
        with suppress(FedloomError):
            step = self._engine.step if reports is not None else None
            self._folder.event(events.Failed(step=step, reason=str(error)))
        return type(error)(f"{error} ({what})")

    def _conclude(self) -> Summary:
        """Write the result and the summary."""
        recipe, engine, folder = self._recipe, self._engine, self._folder
        final, best = self._evaluation, self._progress.better_than(engine.step)
        if recipe.training.load_best_model_at_end and best is not None:
            step, loss = best
            state, notes = read_best(folder.checkpoints, step, engine.manifest)
            engine.write_state(state)
            final = notes["evaluation"]
            folder.event(events.BestChosen(step=step, eval_loss=loss))
        self._charge()
        engine.save_model(folder.path / result_name(recipe))
        summary = _summarise(recipe, engine, self._progress, _initial_evaluation(folder), final)
        folder.write_summary(summary)
        folder.event(events.CentralCompleted(step=engine.step, eval_loss=summary.eval_loss))
        return summary

    def _charge(self) -> None:
        """Write down what the result, with all steps since the last one, tells of any unit, before it is written."""
        mechanism = RecordMechanism.of(self._recipe, self._engine.data_report.units)
        if mechanism is None:
            return
        ledger, step = PrivacyLedger(self._folder.path / LEDGER_FILE), self._engine.step
        before = max((line.at for line in ledger.lines()), default=0)
        if step > before:
            digest = self._engine.read_state().digest
            ledger.charge(self._folder.run_id, step, digest, mechanism.release(step - before))


def _initial_evaluation(folder: RunFolder) -> Evaluation:
    """The sources' losses before the first step, whenever that was."""
    return next((dict(event.evaluation) for event in folder.events(events.Evaluated) if event.step == 0), {})


def _summarise(
    recipe: Recipe,
    engine: Trainable,
    progress: RunFigures,
    initial: Evaluation,
    final: Evaluation,
) -> Summary:
    before = {source: EVAL_REPORT.validate_python(report) for source, report in initial.items()}
    after = {source: EVAL_REPORT.validate_python(report) for source, report in final.items()}
    summary = progress.summary(
        recipe,
        parameters=engine.manifest.size,
        initial_digest=engine.initial_digest,
        state_digest=engine.read_state().digest,
        eval_loss_initial=total(before).loss,
        final=total(after),
        sites={
            source: SiteSummary(
                train_examples=engine.training_sources.get(source, 0),
                eval_examples=after[source].examples if source in after else 0,
                eval_loss_initial=before[source].loss if source in before else None,
                eval_loss=after[source].loss if source in after else None,
            )
            for source in sorted(engine.training_sources.keys() | after.keys())
        },
        steps={"": (engine.data_report.units, engine.step)},
    )
    summary.truncated, summary.dropped = engine.data_report.truncated, engine.data_report.dropped
    return summary


def _next_multiple(step: int, of: int) -> int:
    return (step // of + 1) * of
