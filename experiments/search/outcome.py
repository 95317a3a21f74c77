"""What came of a search, for people, programs and the next pipeline step: `search.json`, `best.yaml`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_training.foundation.strict_json import strict_json
from core_training.recipe.schema import Recipe
from experiments.search.confirmation import Confirmed
from experiments.search.definition import Search, confirmed_recipe

if TYPE_CHECKING:
    from experiments.search.study import Study

OUTCOME_FILE = "search.json"


@dataclass(frozen=True)
class TrialOutcome:
    """A trial: its number, `complete`, `pruned` or `failed`, its objectives, its values, and those at slices' ends."""

    number: int
    state: str
    values: list[float] | None
    keys: dict[str, Any]
    slices: dict[int, float]
    why: str
    seconds: dict[str, float]


@dataclass
class SearchOutcome:
    """All trials; `best` are the numbers of the winner, or of those of several objectives that no other beats in all.

    `importances` is each key's share in what the first objective depends on. `seconds` are this process's: `here` in
    all, `bookkeeping` what Optuna, the journal and the folders took.
    """

    objectives: list[str]
    directions: list[str]
    trials: list[TrialOutcome]
    best: list[int]
    confirmed: list[Confirmed]
    importances: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)

    def trial(self, number: int) -> TrialOutcome:
        """The trial of that number."""
        return next(one for one in self.trials if one.number == number)

    def document(self) -> dict[str, Any]:
        """The outcome as `tune --json` tells it; the value of several objectives is a list."""
        told = [self._told(self.trial(number)) for number in self.best]
        document: dict[str, Any] = {
            "best": told[0] if told else None,
            "trials": len(self.trials),
            "pruned": sum(one.state == "pruned" for one in self.trials),
            "failed": sum(one.state == "failed" for one in self.trials),
            "objective": self.objectives[0] if len(self.objectives) == 1 else self.objectives,
        }
        if len(self.objectives) > 1:
            document["pareto"] = told
        if self.confirmed:
            document["confirmed"] = [asdict(one) for one in self.confirmed]
        return document | {"seconds": self.seconds}

    def _told(self, trial: TrialOutcome) -> dict[str, Any]:
        values = trial.values or []
        return {"value": values[0] if len(self.objectives) == 1 else values, "keys": trial.keys, "trial": trial.number}

    def text(self) -> str:
        """The content of `search.json`."""
        whole = {"schema": 1, **self.document(), "importances": self.importances}
        return strict_json({**whole, "history": [asdict(one) for one in self.trials]}, indent=2) + "\n"


def outcome_of(search: Search, study: Study, confirmations: Sequence[Confirmed]) -> SearchOutcome:
    """What the journal holds, and what was confirmed, as an outcome."""
    from experiments.search.study import ordinal_of, values_of

    trials = [
        TrialOutcome(
            number=ordinal_of(one),
            state=_STATES.get(one.state.name, one.state.name.lower()),
            values=list(one.values) if one.state.name == "COMPLETE" else None,
            keys=values_of(one),
            slices={int(at): float(value) for at, value in one.intermediate_values.items()},
            why=str(one.user_attrs.get("why", "")),
            seconds=dict(one.user_attrs.get("seconds", {})),
        )
        for one in study.trials
        if one.state.is_finished()
    ]
    best = [confirmations[0].trial] if confirmations else [ordinal_of(one) for one in study.best()]
    figures, directions = [o.figure for o in search.objectives], [str(o.direction) for o in search.objectives]
    return SearchOutcome(figures, directions, trials, best, list(confirmations), study.importances())


_STATES: Mapping[str, str] = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}


def best_recipes(search: Search, outcome: SearchOutcome) -> dict[str, Recipe]:
    """The recipes to write, by file: `best.yaml`, and of several objectives one for each of the best."""
    found: dict[str, Recipe] = {}
    for place, number in enumerate(outcome.best):
        values, output = outcome.trial(number).keys, Path(f"{search.output}-best")
        making = confirmed_recipe if outcome.confirmed else Search.recipe_with
        recipe = making(search, values, output)
        if place == 0:
            found["best.yaml"] = recipe
        if len(outcome.objectives) > 1:
            found[f"pareto/{number:04d}.yaml"] = recipe
    return found
