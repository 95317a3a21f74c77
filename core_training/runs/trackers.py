"""Trackers: what is measured in a run, told as it comes about to the libraries that `training.report_to` names.

They are accelerate's. All of them write into the run folder: what would make one send anything is a variable of its
library's own, which a user has set. No party of a federation makes another one report: whoever starts the run does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from core_training.foundation.errors import InputError
from core_training.recipe.schema import Recipe
from core_training.runs.curve import Measured, measured
from core_training.runs.events import Event
from core_training.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

_log = logging.getLogger(__name__)

PROJECT = "fedloom"
"""The name under which trackers that know projects, or experiments, put their runs."""

_CALM_WANDB = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}

_LIBRARIES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}


def check_trackers(recipe: Recipe) -> None:
    """Raise InputError for a tracker whose library is not installed. Loads none of them."""
    for name in recipe.training.report_to:
        if name in _LIBRARIES and not any(find_spec(library) for library in _LIBRARIES[name]):
            raise InputError(
                f"training.report_to: {name} is not installed here; pip install {name}, or leave it out (csv needs "
                "nothing)"
            )


@contextmanager
def reporting(recipe: Recipe, folder: RunFolder, since: int) -> Iterator[None]:
    """Tell the recipe's trackers of a run while the block runs; `since` is the step or round at which it stands.

    Raises InputError for one that cannot be started. One that fails later is said, and told no more.
    """
    check_trackers(recipe)
    if not recipe.training.report_to:
        yield
        return
    _know_the_process()
    trackers = _Trackers({name: _started(name, recipe, folder, since) for name in recipe.training.report_to})
    try:
        with folder.telling(trackers.take):
            yield
    finally:
        trackers.finish()


class _Trackers:
    """The trackers of a run that are still told of it, by name."""

    def __init__(self, running: dict[str, GeneralTracker]) -> None:
        self._running = running

    def take(self, event: Event) -> None:
        for change in measured(event):
            if isinstance(change, Measured):
                self._with_all(partial(_tell, change))

    def finish(self) -> None:
        self._with_all(lambda tracker: tracker.finish())

    def _with_all(self, do: Callable[[GeneralTracker], None]) -> None:
        for name, tracker in list(self._running.items()):
            try:
                do(tracker)
            except Exception as error:  # a library's own troubles end no training
                del self._running[name]
                _log.warning("training.report_to: %s failed and is told no more: %s", name, error)


def _tell(what: Measured, tracker: GeneralTracker) -> None:
    tracker.log({name: value for name, value in what.figures.items() if value is not None}, step=what.at)


def _know_the_process() -> None:
    """Have accelerate know this process as the engine would have it, where no engine was there before."""
    import torch
    from accelerate import PartialState

    if not PartialState._shared_state:
        PartialState(cpu=not torch.cuda.is_available())


def _started(name: str, recipe: Recipe, folder: RunFolder, since: int) -> GeneralTracker:
    try:
        tracker = _MAKERS[name](folder, since)
        tracker.start()
        tracker.store_init_configuration(recipe.flat())
    except Exception as error:
        raise InputError(f"training.report_to: {name} cannot be started: {error}") from error
    return tracker


def _tensorboard(folder: RunFolder, since: int) -> GeneralTracker:
    from accelerate.tracking import TensorBoardTracker

    # What an interrupted run wrote after its last checkpoint is not shown any more.
    return TensorBoardTracker("", _place(folder, "tensorboard"), purge_step=since + 1)


def _wandb(folder: RunFolder, since: int) -> GeneralTracker:
    from accelerate.tracking import WandBTracker

    for variable, value in _CALM_WANDB.items():
        os.environ.setdefault(variable, value)
    return WandBTracker(PROJECT, name=folder.run_id, dir=str(folder.path))  # in a folder `wandb` there


def _mlflow(folder: RunFolder, since: int) -> GeneralTracker:
    import mlflow
    from accelerate.tracking import MLflowTracker

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    place = _place(folder, "mlflow").absolute()
    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{place / 'mlflow.db'}")
    return MLflowTracker(PROJECT, logging_dir=(place / "artifacts").as_uri(), run_name=folder.run_id)


def _trackio(folder: RunFolder, since: int) -> GeneralTracker:
    from accelerate.tracking import TrackioTracker

    # It reads this when it is imported: further runs of one process lie beside the first one's.
    os.environ.setdefault("TRACKIO_DIR", str(_place(folder, "trackio").absolute()))
    return TrackioTracker(PROJECT, name=folder.run_id, auto_log_gpu=False, auto_log_cpu=False)


def _csv(folder: RunFolder, since: int) -> GeneralTracker:
    from core_training.runs.csv_tracker import CsvTracker

    return CsvTracker(folder)


_MAKERS: Mapping[str, Callable[[RunFolder, int], GeneralTracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
    "csv": _csv,
}


def _place(folder: RunFolder, name: str) -> Path:
    place = folder.path / name
    place.mkdir(parents=True, exist_ok=True)
    return place
