"""A site's own model: the common one, trained on for a while on the site's own records, kept where that helps there.

What is own never leaves the site: others are told neither the model nor what it loses.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

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


@dataclass(frozen=True)
class _Best:
    steps: int
    loss: float
    state: TrainableState


def tune_own_model(
    engine: Trainable, recipe: Recipe, common: TrainableState, evaluation: EvalReport, folder: RunFolder
) -> None:
    """Train the common state on, and leave the best that was seen in the run folder's `own`, a run folder itself.

    `evaluation` is the common state's here. Nothing is left where nothing seen was better.
    """
    steps = recipe.topology.own_steps
    if steps is None or evaluation.loss is None:
        return
    tuned, best = engine.alone(steps), None
    until = time.monotonic() + recipe.topology.round_deadline * _SHARE_OF_DEADLINE

    def stop_in_time(*_: int) -> None:
        if time.monotonic() > until:
            tuned.stop()

    try:
        tuned.write_state(common)
        looks = min(_LOOKS, steps)
        for place in (steps * look // looks for look in range(1, looks + 1)):
            if time.monotonic() > until:
                break
            tuned.train(place - tuned.step, stop_in_time)
            loss = total(tuned.evaluate()).loss
            if loss is not None and loss < (best.loss if best else evaluation.loss):
                best = _Best(tuned.step, loss, tuned.read_state())
        reached = tuned.step
        if best is not None:
            tuned.write_state(best.state)
            own = RunFolder(folder.path / FOLDER)
            own.keep_recipe(recipe.alone(steps).to_yaml())
            tuned.save_model(own.path / result_name(recipe))
    finally:
        tuned.close()
    folder.event(
        events.OwnModelTuned(
            steps=best.steps if best else reached,
            eval_loss=best.loss if best else None,
            common_eval_loss=evaluation.loss,
        )
    )
