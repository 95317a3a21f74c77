"""Confirming the best trials: each is run once more, as a federation unless said, and the best of these wins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.figures import figure
from experiments.running import run_recipe
from experiments.search.definition import Search, confirmed_recipe

if TYPE_CHECKING:
    from experiments.search.study import Study


@dataclass(frozen=True)
class Confirmed:
    """A trial that was run again: its number, the objective then and now."""

    trial: int
    value: float
    confirmed: float


def confirmed(search: Search, study: Study, watch: Any) -> list[Confirmed]:
    """The confirmations, best first; none where none are asked for. Those that are done are not run again."""
    from experiments.search.study import ordinal_of, ranked, values_of

    if search.confirm is None:
        return []
    objective = search.objectives[0]
    complete = [one for one in study.trials if one.state.name == "COMPLETE"]
    found = []
    for trial in ranked(complete, objective)[: search.confirm.top]:
        ordinal = ordinal_of(trial)
        recipe = confirmed_recipe(search, values_of(trial), search.output / "confirm" / f"{ordinal:04d}")
        with watch(f"confirming trial {ordinal}, {recipe.topology.kind}") as on_progress:
            summary = run_recipe(recipe, on_progress, resume=True)
        found.append(Confirmed(ordinal, trial.values[0], figure(summary, objective.figure, "objective")))
    sign = 1.0 if objective.direction == "minimize" else -1.0
    return sorted(found, key=lambda one: (sign * one.confirmed, one.trial))
