"""The recipes with which a run can go on: its own, that with its curve kept otherwise, and longer ones."""

from __future__ import annotations

from typing import Any

from core_training.foundation.errors import InputError
from core_training.recipe.schema import Recipe

_CURVE = {"logging_steps", "report_to"}
_LENGTH: dict[str, set[str]] = {"training": {"max_steps", "num_train_epochs"}, "topology": {"rounds"}}
_WITHOUT_END = ("constant", "constant_with_warmup", "inverse_sqrt")
"""Schedules that are the same however long the run is, unless their warm-up is a share of it."""


def is_same_run(earlier: Recipe, now: Recipe) -> bool:
    """Whether two recipes ask for the same run, wherever it writes to and however its curve is kept."""
    return _difference(earlier, now, {}) is None


def check_goes_on(earlier: Recipe, now: Recipe, steps_behind: int) -> bool:
    """Whether `now` makes the run of `earlier`, with so many steps of a central one behind it, longer.

    Raises InputError, which the caller puts the run's name before, where the run cannot go on with `now`.
    """
    if (section := _difference(earlier, now, {})) is None:
        return False
    if (other := _difference(earlier, now, _LENGTH)) is not None:
        raise InputError(f"the run to resume has another {other}; use its recipe.yaml, or --out")
    if now.privacy.secure is not None and now.topology.kind != "central":
        raise InputError("topology.rounds: a run that aggregates securely ends where it was to end; start another")
    if not _is_longer(earlier, now) or steps_behind > (now.total_steps or steps_behind):
        raise InputError(
            f"the run to resume has another {section}: it was to take {_length(earlier)}, and can only be made longer; "
            "use its recipe.yaml, or --out"
        )
    return True


def schedule_note(earlier: Recipe, now: Recipe) -> str | None:
    """What becomes of the learning rate in a run that was made longer; None where its schedule has no end."""
    schedule = now.training.lr_scheduler_type
    if schedule == "constant" or (schedule in _WITHOUT_END and not now.training.warmup_ratio):
        return None
    return (
        f"training.lr_scheduler_type: from here on the learning rate is that of a {schedule} schedule over "
        f"{_length(now)}; up to here it was that over {_length(earlier)}"
    )


def _difference(earlier: Recipe, now: Recipe, left_out: dict[str, set[str]]) -> str | None:
    """The first section in which two recipes differ, apart from what may, and from whether they may fetch a model."""
    training = _CURVE | left_out.get("training", set())
    excluded: dict[str, Any] = {"output": True, "model": {"download"}, **left_out, "training": training}
    before, after = earlier.model_dump(exclude=excluded), now.model_dump(exclude=excluded)
    return next((section for section in before if before[section] != after[section]), None)


def _is_longer(earlier: Recipe, now: Recipe) -> bool:
    """Whether a recipe asks for more than another, as far as that shows without the data."""
    before, after = earlier.total_steps, now.total_steps
    if after is None:
        return before is None and now.training.num_train_epochs > earlier.training.num_train_epochs
    return before is None or after > before


def _length(recipe: Recipe) -> str:
    if recipe.total_steps is None:
        return f"{recipe.training.num_train_epochs:g} passes over the data"
    return f"{recipe.total_steps} steps"
