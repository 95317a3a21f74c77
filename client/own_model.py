"""A site's own model: the common one, trained on for a while on the site's own records, kept where that helps there.

It begins where the site's held-out records are answered best on the straight way from the run's start to the common
model (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models"): what the base knows of a site's records, others'
may have cost it. What is own never leaves the site: others are told neither the model nor what it loses.
"""

from __future__ import annotations

import shutil
import time
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from core_training.foundation.durable import commit_folder
from core_training.foundation.errors import FedloomError, RunError
from core_training.foundation.state import TrainableState
from core_training.foundation.trainable import EvalReport, Trainable, total
from core_training.recipe.learning_rate import learning_rate_of, width_of
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.result_format import result_name
from core_training.runs.run_folder import RunFolder

FOLDER = "own"
_SHARE_OF_DEADLINE = 0.5
"""Of `topology.round_deadline`, in which the answer to whoever leads the run has to come."""
_LOOKS = 8
"""Evaluations on the way, at even distances: few records are soon learnt by heart."""
_STARTS = (0.0, 0.25, 0.5, 0.75)
"""Shares of the way from the run's start to the common model at which training may begin, beside the end."""
_SHARE_OF_RATE = 0.25
"""Of the learning rate that trained the common model: what is learnt already is undone at the whole of it."""


@dataclass
class _Search:
    """What came of the training: the best state that was seen, if any was better, after how many steps."""

    loss: float
    """Of the common model, then of the best."""
    best: TrainableState | None = None
    steps: int = 0
    share: float = 1.0
    """Of the way to the common model, where it began."""
    reason: str = ""
    """Why it went no further, where it failed."""

    def look(self, tuned: Trainable) -> bool:
        """Evaluate what the site holds, and keep it where it is the best so far; returns whether it is."""
        loss = total(tuned.evaluate()).loss
        if loss is None or loss >= self.loss:
            return False
        self.loss, self.best, self.steps = loss, tuned.read_state(), tuned.step
        return True


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
    rate = recipe.topology.own_learning_rate
    if rate is None:
        rate = _SHARE_OF_RATE * learning_rate_of(recipe.alone(steps), width_of(engine.manifest))
    with closing(engine.alone(steps, rate, recipe.topology.own_proximal_mu)) as tuned:
        search = _Search(loss)
        until = time.monotonic() + recipe.topology.round_deadline * _SHARE_OF_DEADLINE
        try:
            _train(tuned, _start(tuned, common, until, search), steps, until, search)
        except FedloomError as error:
            if isinstance(error, RunError) and error.process_is_lost:
                raise
            search.reason = str(error)
        if search.best is not None:
            tuned.write_state(search.best)
            with commit_folder(folder.path / FOLDER) as scratch:
                (scratch / "recipe.yaml").write_text(recipe.alone(steps, rate).to_yaml(), encoding="utf-8")
                tuned.save_model(scratch / result_name(recipe))
    folder.event(
        events.OwnModelTuned(
            steps=search.steps,
            eval_loss=search.loss if search.best is not None else None,
            common_eval_loss=loss,
            reason=search.reason,
            share=search.share,
        )
    )


def _start(tuned: Trainable, common: TrainableState, until: float, search: _Search) -> TrainableState:
    """The best state on the way from the run's start to the common one."""
    first = tuned.initial_state
    for share in _STARTS:
        if time.monotonic() > until:
            break
        tuned.write_state(_between(first, common, share))
        if search.look(tuned):
            search.share = share
    return search.best or common


def _between(first: TrainableState, last: TrainableState, share: float) -> TrainableState:
    """The state at this share of the way between two: each value by itself."""
    return TrainableState(first.manifest, first.buffer + np.float32(share) * (last.buffer - first.buffer))


def _train(tuned: Trainable, start: TrainableState, steps: int, until: float, search: _Search) -> None:
    """Train from a state for so many steps, or until then, and note the best of what is seen on the way."""

    def stop_in_time(*_: int) -> None:
        if time.monotonic() > until:
            tuned.stop()

    tuned.write_state(start)
    looks = min(_LOOKS, steps)
    for place in (steps * look // looks for look in range(1, looks + 1)):
        tuned.train(place - tuned.step, stop_in_time)
        search.look(tuned)
        if time.monotonic() > until:
            break
    if search.best is None:
        search.steps = tuned.step
