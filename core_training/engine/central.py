"""Central training: one engine run to the end, with checkpoints, evaluations and an orderly stop on a signal."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core_training.foundation.errors import FedloomError, Interrupted, RunError
from core_training.foundation.trainable import (
    EVAL_REPORT,
    Trainable,
    TrainReport,
    means,
    total,
)
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.checkpoints import prune_checkpoints
from core_training.runs.figures import RunFigures
from core_training.runs.result_format import result_name
from core_training.runs.run_folder import RunFolder, SiteSummary, Summary


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

    Raises Interrupted, with everything saved, after SIGINT or SIGTERM; these are left alone without `heeds_signals`.
    """
    with _stop_on_signal(engine) if heeds_signals else nullcontext(_Stopped()) as stopped:
        progress = _start_or_resume(engine, folder, resume=resume)
        began = time.perf_counter() - progress.seconds_total
        interval = recipe.topology.local_steps or recipe.training.save_steps
        try:
            while engine.step < engine.total_steps:
                _leave_if(stopped, engine, folder, progress)
                until = min(_next_multiple(engine.step, n) for n in (interval, recipe.training.save_steps))
                _note(engine.train(min(until, engine.total_steps) - engine.step, on_step), engine, folder, progress)
                progress.seconds_total = time.perf_counter() - began
                _leave_if(stopped, engine, folder, progress)
                ended = engine.step == engine.total_steps
                if ended or engine.step % recipe.training.save_steps == 0:
                    _checkpoint(engine, folder, progress)
                if not ended and engine.step % (interval * recipe.topology.eval_every) == 0:
                    _evaluate(engine, folder)
            final = _evaluate(engine, folder)
        except RunError as error:
            progress.seconds_total = time.perf_counter() - began
            raise _failed(error, engine, folder, progress) from error
        _leave_if(stopped, engine, folder, progress)
        engine.save_model(folder.path / result_name(recipe))
        summary = _summarise(recipe, engine, progress, _initial_evaluation(folder), final)
        folder.write_summary(summary)
        folder.event(events.CentralCompleted(step=engine.step, eval_loss=summary.eval_loss))
        return summary


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest committed checkpoint, or None."""
    return max(folder.glob("step-*"), default=None)


def _start_or_resume(engine: Trainable, folder: RunFolder, *, resume: bool) -> RunFigures:
    last = latest_checkpoint(folder.checkpoints) if resume else None
    if last is not None:
        progress = RunFigures.from_json(engine.restore(last))
        folder.event(events.ResumedAtStep(step=engine.step))
        return progress
    folder.event(events.CentralStarted(total_steps=engine.total_steps, **asdict(engine.data_report)))
    _evaluate(engine, folder)
    return RunFigures()


def _initial_evaluation(folder: RunFolder) -> dict[str, Any]:
    """The sources' losses before the first step, whenever that was."""
    return next((dict(event.evaluation) for event in folder.events(events.Evaluated) if event.step == 0), {})


def _leave_if(stopped: _Stopped, engine: Trainable, folder: RunFolder, progress: RunFigures) -> None:
    """Save and stop, once a signal has come."""
    if stopped:
        _checkpoint(engine, folder, progress)
        folder.event(events.InterruptedAtStep(step=engine.step))
        raise Interrupted(
            f"interrupted at step {engine.step} of {engine.total_steps}, saved in {folder.path}; --resume goes on"
        )


def _note(report: TrainReport, engine: Trainable, folder: RunFolder, progress: RunFigures) -> None:
    progress.trained(report)
    figures = means(report.figures)
    folder.event(events.StepsTrained(step=engine.step, loss=report.loss_mean, weight=report.weight, figures=figures))


def _failed(error: RunError, engine: Trainable, folder: RunFolder, progress: RunFigures) -> RunError:
    """Save the steps before the one that failed, if they are there to be saved; return what to say."""
    reports = engine.salvage()
    # What made a step fail may make what follows fail too, a full disk for one; it is the step that is told.
    for report in reports or []:
        with suppress(FedloomError):
            _note(report, engine, folder, progress)
    if reports is not None:
        with suppress(FedloomError):
            _checkpoint(engine, folder, progress)
    saved = latest_checkpoint(folder.checkpoints)
    what = (
        f"step {int(saved.name.removeprefix('step-'))} is saved in {folder.path}; --resume goes on from it"
        if saved
        else "no step was saved"
    )
    with suppress(FedloomError):
        folder.event(events.Failed(step=engine.step if reports is not None else None, reason=str(error)))
    return type(error)(f"{error} ({what})")


def _checkpoint(engine: Trainable, folder: RunFolder, progress: RunFigures) -> None:
    engine.checkpoint(folder.checkpoints / f"step-{engine.step:08d}", progress.to_json())
    prune_checkpoints(folder.checkpoints, "step-*")


def _evaluate(engine: Trainable, folder: RunFolder) -> dict[str, dict[str, Any]]:
    reports = engine.evaluate()
    evaluation = {source: asdict(report) for source, report in reports.items()}
    folder.event(events.Evaluated(step=engine.step, loss=total(reports).loss, evaluation=evaluation))
    return evaluation


def _summarise(
    recipe: Recipe,
    engine: Trainable,
    progress: RunFigures,
    initial: dict[str, dict[str, Any]],
    final: dict[str, dict[str, Any]],
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
    )
    summary.truncated, summary.dropped = engine.data_report.truncated, engine.data_report.dropped
    return summary


def _next_multiple(step: int, of: int) -> int:
    return (step // of + 1) * of


class _Stopped:
    """A flag, true once a signal asked the run to stop."""

    def __init__(self) -> None:
        self.asked = False

    def __bool__(self) -> bool:
        return self.asked


@contextmanager
def _stop_on_signal(engine: Trainable) -> Iterator[_Stopped]:
    """The first SIGINT or SIGTERM lets the running step end; a second SIGINT stops at once."""
    stopped = _Stopped()

    def stop(number: int, frame: Any) -> None:
        # Launchers repeat SIGTERM: Slurm some time after the first, DeepSpeed's right after Ctrl-C.
        if stopped.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopped.asked = True
        engine.stop()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
