"""One trial: a run of the recipe with its values, ended early where the pruner says so at the end of a slice."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core_training.foundation.errors import DivergedError, FedloomError, InputError, Interrupted, RunError
from core_training.privacy.ledger import LEDGER_FILE, PrivacyLedger
from core_training.privacy.mechanism import RecordMechanism
from core_training.recipe.schema import Recipe
from core_training.runs.events import CentralStarted, Event, StepsTrained
from core_training.runs.run_folder import RunFolder
from experiments.figures import figure
from experiments.running import run_recipe
from experiments.search.engines import Engines
from experiments.search.objectives import Objective, told_by

if TYPE_CHECKING:
    from core_training.engine.engine import Engine

ShouldPrune = Callable[[int, float], bool]
"""Told the number of a slice and the objective after it; whether the trial is to end."""

OnStep = Callable[[int, int], None]


class PrunedTrial(Exception):
    """The pruner ended a trial at the end of this slice."""


@dataclass
class Ended:
    """How a trial ended: its objectives (complete ones alone), why, and the seconds of its parts."""

    state: Literal["complete", "pruned", "failed"]
    values: list[float] | None = None
    why: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


class _Slices:
    """Listens to a run's events, tells the pruner, and raises PrunedTrial where that ends it."""

    def __init__(self, objective: Objective, should_prune: ShouldPrune | None, last: int | None) -> None:
        self._objective = objective
        self._should_prune = should_prune
        self._last = last
        self._slices = 0
        self.seconds = 0.0

    def __call__(self, event: Event) -> None:
        if self._should_prune is None or (told := told_by(event, self._objective.figure)) is None:
            return
        at, value = told
        if value is None or at == self._last:
            return
        began = time.perf_counter()
        self._slices += 1
        ends = self._should_prune(self._slices, value)
        self.seconds += time.perf_counter() - began
        if ends:
            raise PrunedTrial(f"{self._objective.figure} {value:.6g} after slice {self._slices}")


def run_trial(
    recipe: Recipe,
    objectives: tuple[Objective, ...],
    engines: Engines,
    should_prune: ShouldPrune | None,
    on_step: OnStep = lambda *_: None,
) -> Ended:
    """Run a trial into `recipe.output`. What fails in it is told in the outcome; an interruption is raised."""
    slices = _Slices(objectives[0], should_prune, None)
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    try:
        if recipe.topology.kind == "central":
            summary = _train(recipe, engines, slices, on_step, seconds)
        else:
            summary = _simulate(recipe, slices, on_step)
        values = [figure(summary, one.figure, "objective") for one in objectives]
        ended = Ended("complete", values)
    except PrunedTrial as pruned:
        ended = Ended("pruned", why=str(pruned))
    except DivergedError as error:  # as bad as can be, and the search has to learn it
        ended = Ended("pruned", why=f"diverged: {error}")
    except Interrupted:
        raise
    except (InputError, RunError) as error:
        if isinstance(error, RunError) and error.process_is_lost:
            raise
        ended = Ended("failed", why=str(error))
    ended.seconds = {**seconds, "pruner": slices.seconds, "trial": time.perf_counter() - began}
    return ended


def _train(
    recipe: Recipe, engines: Engines, slices: _Slices, on_step: OnStep, seconds: dict[str, float]
) -> dict[str, Any]:
    from core_training.engine.central import train

    began = time.perf_counter()
    folder = RunFolder(Path(recipe.output))
    with engines.opened(recipe) as engine, folder.claimed():
        seconds["opening"] = time.perf_counter() - began
        folder.prepare(recipe, resume=False)
        try:
            with folder.telling(slices):
                train(recipe, engine, folder, on_step, heeds_signals=False)
        except (PrunedTrial, FedloomError):
            _charge(recipe, engine, folder)
            raise
    return folder.summary() or {}


def _charge(recipe: Recipe, engine: Engine, folder: RunFolder) -> None:
    """Write down what the steps of a trial that did not end told, by its losses: no result of it is written."""
    mechanism = RecordMechanism.of(recipe, engine.data_report.units)
    if mechanism is not None and engine.step:
        ledger = PrivacyLedger(folder.path / LEDGER_FILE)
        ledger.charge(folder.run_id, engine.step, engine.read_state().digest, mechanism.release(engine.step))


def charge_killed(path: Path) -> None:
    """Write down what the steps of a trial told whose process was killed, as far as its events have them."""
    folder = RunFolder(path)
    if not (path / "recipe.yaml").is_file() or (path / LEDGER_FILE).is_file():
        return
    units = max((event.units for event in folder.events(CentralStarted)), default=0)
    steps = max((event.step for event in folder.events(StepsTrained)), default=0)
    mechanism = RecordMechanism.of(folder.recipe, units)
    if mechanism is not None and folder.recipe.topology.kind == "central" and steps:
        release = mechanism.release(steps)
        PrivacyLedger(path / LEDGER_FILE).charge(folder.run_id, steps, secrets.token_hex(32), release)


def _simulate(recipe: Recipe, slices: _Slices, on_step: OnStep) -> dict[str, Any]:
    folder = RunFolder(Path(recipe.output))

    def tell(done: int, total: int, _: str) -> None:
        on_step(done, total)
        for event in folder.new_events():
            slices(event)

    return run_recipe(recipe, tell)


def tidied(run: Path) -> None:
    """Remove a trial's checkpoints: no trial is gone on with."""
    for checkpoints in [run / "checkpoints", *run.glob("sites/*/*/checkpoints"), *run.glob("sites/*/checkpoints")]:
        for one in checkpoints.iterdir() if checkpoints.is_dir() else ():
            shutil.rmtree(one, ignore_errors=True)


def without_result(run: Path) -> None:
    """Remove what a trial trained; its recipe, figures and curve stay."""
    for name in ("adapter", "model", "layers", "sites"):
        shutil.rmtree(run / name, ignore_errors=True)
