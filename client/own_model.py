"""A site's own model: the common one, trained on for a while on the site's own records, kept where that helps there.

What is own never leaves the site: others are told neither the model nor what it loses.
"""

from __future__ import annotations

import shutil
import time
from contextlib import closing
from dataclasses import dataclass

from core_training.foundation.durable import commit_folder
from core_training.foundation.errors import FedloomError, RunError
from core_training.foundation.state import TrainableState
from core_training.foundation.trainable import EvalReport, Trainable, total
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.result_format import result_name
from core_training.runs.run_folder import RunFolder

FOLDER = "own"
_SHARE_OF_DEADLINE = 0.5
"""Of `topology.round_deadline`, in which the answer to whoever leads the run has to come."""
_LOOKS = 4
"""Evaluations on the way, at even distances: few records are soon learnt by heart."""


@dataclass
class _Search:
    """What came of the training: the best state that was seen, if any was better, after how many steps."""

    loss: float
    """Of the common model, then of the best."""
    best: TrainableState | None = None
    steps: int = 0
    reason: str = ""
    """Why it went no further, where it failed."""


def tune_own_model(
    engine: Trainable, recipe: Recipe, common: TrainableState, evaluation: EvalReport, folder: RunFolder
) -> None:
    """Train the common state on, and leave the best that was seen in the run folder's `own`, a run folder itself.

    `evaluation` is the common state's here. Nothing is left where nothing seen was better; a failure is told, and
    changes nothing of the common model.
    """
    if (steps := recipe.topology.own_steps) is None:
        return
    shutil.rmtree(folder.path / FOLDER, ignore_errors=True)  # of an earlier end of the run
    if (loss := evaluation.loss) is None:
        folder.event(events.OwnModelTuned(steps=0, reason="the site has no held-out records"))
        return
    with closing(engine.alone(steps)) as tuned:
        search = _Search(loss)
        try:
            _train(tuned, common, steps, recipe.topology.round_deadline * _SHARE_OF_DEADLINE, search)
        except FedloomError as error:
            if isinstance(error, RunError) and error.process_is_lost:
                raise
            search.reason = str(error)
        if search.best is not None:
            tuned.write_state(search.best)
            with commit_folder(folder.path / FOLDER) as scratch:
                (scratch / "recipe.yaml").write_text(recipe.alone(steps).to_yaml(), encoding="utf-8")
                tuned.save_model(scratch / result_name(recipe))
    own = search.loss if search.best is not None else None
    folder.event(events.OwnModelTuned(steps=search.steps, eval_loss=own, common_eval_loss=loss, reason=search.reason))


def _train(tuned: Trainable, common: TrainableState, steps: int, seconds: float, search: _Search) -> None:
    """Train from the common state for so many steps, or as long, and note the best of what is seen on the way."""
    until = time.monotonic() + seconds

    def stop_in_time(*_: int) -> None:
        if time.monotonic() > until:
            tuned.stop()

    tuned.write_state(common)
    looks = min(_LOOKS, steps)
    for place in (steps * look // looks for look in range(1, looks + 1)):
        tuned.train(place - tuned.step, stop_in_time)
        loss = total(tuned.evaluate()).loss
        if loss is not None and loss < search.loss:
            search.loss, search.best = loss, tuned.read_state()
            search.steps = tuned.step
        if time.monotonic() > until:
            break
    if search.best is None:
        search.steps = tuned.step
