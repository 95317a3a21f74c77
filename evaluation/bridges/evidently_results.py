"""What Evidently's report.json says, as figures of ours: each column's statistics, drift, and the named tests. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core_training.foundation.bounded_reading import (
    MOST_JSON_BYTES,
    ForeignTextError,
    parse_value,
    read_bounded,
    reason_of,
    shortened_text,
)
from core_training.foundation.errors import RunError
from evaluation.bridges.named_tests import NamedTest

_METRIC = "evidently:metric_v2:"
_COMPARISONS = {
    "evidently:test_v2:GreaterOrEqualMetricTest": ">=",
    "evidently:test_v2:LessOrEqualMetricTest": "<=",
    "evidently:test_v2:GreaterThanMetricTest": ">",
    "evidently:test_v2:LessThanMetricTest": "<",
}
_STATISTICS = {"MinValue": "min", "MaxValue": "max", "MeanValue": "mean", "StdValue": "std", "MedianValue": "median"}


@dataclass(frozen=True)
class TestOutcome:
    """What became of a named test: `threshold` is the number that it was held against in the end."""

    __test__ = False  # it is no test of pytest's

    test: NamedTest
    threshold: float
    passed: bool
    said: str


@dataclass(frozen=True)
class EvidentlyResults:
    """Evidently's own numbers on the candidate's `n` answers.

    `figures` has each column's min, max, mean and std, or its `share`, and its `drift` where there was a reference: the
    distance between both (none is 0); what does not apply is not there. `offline` says that it ran where there is no
    network.
    """

    n: int
    figures: dict[str, dict[str, float]]
    tests: tuple[TestOutcome, ...]
    versions: dict[str, str]
    offline: bool
    notes: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether all named tests passed."""
        return all(one.passed for one in self.tests)

    def document(self) -> dict[str, Any]:
        """All of it, for JSON."""
        tests = [
            {"name": one.test.name, "threshold": one.threshold, "passed": one.passed, "said": one.said}
            for one in self.tests
        ]
        return {
            "n": self.n,
            "figures": self.figures,
            "tests": tests,
            "passed": self.passed,
            "versions": self.versions,
            "offline": self.offline,
            "notes": list(self.notes),
        }


def read_results(
    folder: Path, tests: Sequence[NamedTest], *, offline: bool, notes: tuple[str, ...] = ()
) -> EvidentlyResults:
    """The results in a folder where a report was written. Raises RunError where it says something else."""
    try:
        report, outcome = (_read(folder / name) for name in ("report.json", "outcome.json"))
        figures: dict[str, dict[str, float]] = {}
        rows = 0.0
        for metric in report["metrics"]:
            kind, config = metric["config"]["type"].removeprefix(_METRIC), metric["config"]
            if kind == "RowCount":
                rows = metric["value"]
            elif "column" in config and (found := _figure(kind, metric["value"])) and math.isfinite(found[1]):
                figures.setdefault(config["column"], {})[found[0]] = found[1]
        outcomes = _outcomes(report["tests"], tests, outcome["thresholds"])
        versions = {name: str(outcome[name]) for name in ("evidently", "pandas")}
    except (OSError, ForeignTextError) as error:
        raise RunError(f"Evidently wrote no report that can be read: {reason_of(error)}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"report.json is no report of the Evidently that fedloom knows: {error!r}") from None
    return EvidentlyResults(int(rows), figures, outcomes, versions, offline, notes)


def _read(path: Path) -> Any:
    """The value in one of Evidently's files, which have NaN where a figure does not apply."""
    content = read_bounded(path, MOST_JSON_BYTES)
    try:
        return parse_value(content)
    except ValueError as error:
        raise ForeignTextError(f"{path.name}: not valid JSON: {shortened_text(error, 120)}") from None


def _figure(kind: str, value: Any) -> tuple[str, float] | None:
    if kind in _STATISTICS:
        return _STATISTICS[kind], float(value)
    if kind == "CategoryCount":
        return "share", float(value["share"])
    return ("drift", float(value)) if kind == "ValueDrift" else None


def _outcomes(told: Any, tests: Sequence[NamedTest], thresholds: Any) -> tuple[TestOutcome, ...]:
    """Evidently tells tests in the order of their metrics; each is held against the one that was asked for."""
    if not len(told) == len(tests) == len(thresholds):
        raise RunError(f"Evidently carried out {len(told)} tests where {len(tests)} were named")
    outcomes = []
    for one, test, threshold in zip(told, tests, thresholds, strict=True):
        config = one["test_config"]
        if (_COMPARISONS.get(config["type"]), config["threshold"]) != (test.comparison, threshold):
            raise RunError(f"Evidently carried out '{one['name']}' where '{test.name}' was named")
        outcomes.append(TestOutcome(test, threshold, one["status"] == "SUCCESS", one["description"]))
    return tuple(outcomes)
