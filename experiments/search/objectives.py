"""What a search is to make small or large: figures of the trials' summaries, and the same on the way to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from core_training.foundation.bounded_reading import shortened
from core_training.foundation.errors import InputError
from core_training.foundation.trainable import EVAL_REPORT, total
from core_training.runs.events import Evaluated, Event, Round
from experiments.figures import check_name

Direction = Literal["minimize", "maximize"]
_DIRECTIONS = {"minimize": "minimize", "minimise": "minimize", "maximize": "maximize", "maximise": "maximize"}
_SMALL = ("loss", "seconds", "bytes", "bytes_up", "bytes_down", "tokens_trained", "epsilon", "perplexity")
"""Beginnings or ends of the names of figures that nobody wants large."""


@dataclass(frozen=True)
class Objective:
    """A figure of the summary, and what it is to become."""

    figure: str
    direction: Direction

    def is_better(self, value: float, than: float) -> bool:
        """Whether a value is better than another."""
        return value < than if self.direction == "minimize" else value > than

    def can_prune(self, topology: str) -> bool:
        """Whether it is known at the ends of slices, before a run's end."""
        if topology == "federated":
            return self.figure == "eval_loss"
        return topology == "central" and (self.figure == "eval_loss" or self.figure.startswith("metrics."))


def parse_objectives(given: object) -> tuple[Objective, ...]:
    """The objectives: a figure's name, `{NAME: minimize | maximize}`, or a list of these. Raises InputError."""
    found: list[Objective] = []
    for one in given if isinstance(given, list) else [given]:
        pairs = one.items() if isinstance(one, dict) else [(one, None)]
        for name, direction in pairs:
            found.append(_objective(name, direction))
    if not found:
        raise InputError("objective: name at least one figure of summary.json, such as eval_loss")
    names = [objective.figure for objective in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"objective: {twice[0]} is there twice")
    return tuple(found)


def _objective(name: object, direction: object) -> Objective:
    if not isinstance(name, str):
        raise InputError(f"objective: name a figure of summary.json, such as eval_loss, not {shortened(name)}")
    check_name(name, "objective")
    if direction is None:
        last = name.split(".")[-1]
        if not (name.startswith("seconds.") or any(last.endswith(end) or last.startswith(end) for end in _SMALL)):
            raise InputError(f"objective: say which way: {{{name}: maximize}} or {{{name}: minimize}}")
        return Objective(name, "minimize")
    if direction not in _DIRECTIONS:
        raise InputError(f"objective.{name}: minimize or maximize, not {shortened(direction)}")
    return Objective(name, "minimize" if _DIRECTIONS[str(direction)] == "minimize" else "maximize")


def told_by(event: Event, figure: str) -> tuple[int, float | None] | None:
    """What an event tells of a figure: the step, or the rounds, after which it was so, and the value.

    None for an event that tells nothing, and for the state before training.
    """
    if isinstance(event, Evaluated) and event.step > 0:
        return event.step, _in_evaluation(event, figure)
    if isinstance(event, Round) and event.round > 1 and figure == "eval_loss":
        return event.round - 1, event.eval_loss  # sites judge the state that a round begins with
    return None


def _in_evaluation(event: Evaluated, figure: str) -> float | None:
    if figure == "eval_loss":
        return event.loss
    reports: Mapping[str, Any] = {name: EVAL_REPORT.validate_python(one) for name, one in event.evaluation.items()}
    return total(reports).metrics.get(figure.removeprefix("metrics."))
