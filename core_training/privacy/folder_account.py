"""The account of a folder: a site's over all its runs, a run's own, or what a federated run's summary says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from core_training.privacy.account import assumptions_of, words_of
from core_training.privacy.accounting import ACCOUNTANT, ADJACENCY, epsilon_of
from core_training.privacy.ledger import Budget, LedgerLine


@dataclass(frozen=True)
class UnitAccount:
    """All releases about units of one kind: ε at δ, and that of each run by itself."""

    unit: str
    epsilon: float
    delta: float
    releases: int
    runs: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What `fedloom privacy --json` says of it."""
        runs = [{"run": run, "epsilon": epsilon} for run, epsilon in self.runs.items()]
        return {
            "unit": self.unit,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "releases": self.releases,
            "runs": runs,
            "mechanism": words_of(self.unit),
            "adjacency": ADJACENCY,
            "accountant": ACCOUNTANT,
            "assumptions": assumptions_of(self.unit),
        }


def accounts_of(lines: Sequence[LedgerLine], delta: float, budget: Budget | None) -> list[UnitAccount]:
    """The accounts of a ledger's lines, one for each kind of unit; with a budget at its δ, and first.

    Raises InputError where dp-accounting is not installed.
    """
    units = list(dict.fromkeys([*([budget.unit] if budget else []), *(line.unit for line in lines)]))
    return [_account(unit, [line for line in lines if line.unit == unit], delta, budget) for unit in units]


def _account(unit: str, lines: Sequence[LedgerLine], delta: float, budget: Budget | None) -> UnitAccount:
    delta = budget.delta if budget is not None and budget.unit == unit else delta
    runs = dict.fromkeys(line.run for line in lines)
    return UnitAccount(
        unit,
        epsilon_of((line.release for line in lines), delta),
        delta,
        len(lines),
        {run: epsilon_of((line.release for line in lines if line.run == run), delta) for run in runs},
    )
