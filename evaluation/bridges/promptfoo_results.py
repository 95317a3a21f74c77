"""What promptfoo wrote, as figures of ours: results.json, held against results.junit.xml. Pure but for reading them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from core_training.foundation.bounded_reading import (
    MOST_JSON_BYTES,
    ForeignTextError,
    read_bounded,
    read_json,
    reason_of,
    shortened_text,
)
from core_training.foundation.errors import RunError

_MOST_BYTES = 8 * MOST_JSON_BYTES


@dataclass
class Counts:
    """Of one check: answers that it looked at, those that passed, and the sum of their scores."""

    n: int = 0
    passed: int = 0
    score: float = 0.0


@dataclass
class ContestantResults:
    """Of one contestant: cases that passed all checks, that failed one, that could not be carried out; and checks."""

    passed: int = 0
    failed: int = 0
    errors: int = 0
    checks: dict[str, Counts] = field(default_factory=dict)
    first_error: str | None = None

    def document(self) -> dict[str, Any]:
        """All of it, for JSON: a check's `share` passed, its `score` is the mean."""
        checks = {
            name: {"n": one.n, "share": one.passed / one.n, "score": one.score / one.n}
            for name, one in self.checks.items()
        }
        return {"passed": self.passed, "failed": self.failed, "errors": self.errors, "checks": checks} | (
            {"first_error": self.first_error} if self.first_error else {}
        )


@dataclass(frozen=True)
class PromptfooResults:
    """promptfoo's own numbers, by contestant. `offline` says that it ran where there is no network."""

    contestants: Mapping[str, ContestantResults]
    offline: bool
    left_out: Mapping[str, int]

    @property
    def asked(self) -> int:
        return sum(one.passed + one.failed + one.errors for one in self.contestants.values())

    @property
    def passed(self) -> bool:
        """Whether every case of every contestant passed."""
        return all(not one.failed and not one.errors for one in self.contestants.values())

    def document(self) -> dict[str, Any]:
        return {
            "contestants": {name: one.document() for name, one in sorted(self.contestants.items())},
            "passed": self.passed,
            "offline": self.offline,
            "left_out": dict(self.left_out),
        }


def read_results(folder: Path, *, offline: bool, left_out: Mapping[str, int]) -> PromptfooResults:
    """The results that lie in a folder. Raises RunError where promptfoo's two files cannot be read or disagree."""
    try:
        results = read_json(folder / "results.json", _MOST_BYTES)["results"]
        found: dict[str, ContestantResults] = {}
        for case in results["results"]:
            _add(found.setdefault(case["provider"]["label"], ContestantResults()), case)
        stats = results["stats"]
        told = (stats["successes"], stats["failures"], stats["errors"])
        junit = _junit(folder / "results.junit.xml")
    except (OSError, ForeignTextError) as error:
        raise RunError(f"promptfoo wrote no results that can be read: {reason_of(error)}") from None
    except (KeyError, TypeError, AttributeError, ValueError, ElementTree.ParseError) as error:
        raise RunError(f"these are no results of the promptfoo that fedloom knows: {error!r}") from None
    ours = tuple(sum(getattr(one, what) for one in found.values()) for what in ("passed", "failed", "errors"))
    if not ours == told == junit:
        raise RunError(f"promptfoo counts passed, failed, errors as {told}, its cases as {ours}, its JUnit as {junit}")
    return PromptfooResults(found, offline, left_out)


def _add(results: ContestantResults, case: Mapping[str, Any]) -> None:
    graded = (case.get("gradingResult") or {}).get("componentResults") or []
    if case["success"]:
        results.passed += 1
    elif graded:
        results.failed += 1
    else:  # nobody could grade it
        results.errors += 1
        results.first_error = results.first_error or shortened_text(case.get("error") or "no reason given", 200)
    for one in graded:
        counts = results.checks.setdefault(one["assertion"]["metric"], Counts())
        counts.n += 1
        counts.passed += bool(one["pass"])
        counts.score += float(one["score"])


def _junit(path: Path) -> tuple[int, int, int]:
    """Cases that passed, failed and could not be carried out. An entity, which can be endless, is refused."""
    content = read_bounded(path, _MOST_BYTES)
    if b"<!ENTITY" in content or b"<!DOCTYPE" in content:
        raise ForeignTextError("it declares entities")
    cases = list(ElementTree.fromstring(content).iter("testcase"))
    failed = sum(case.find("failure") is not None for case in cases)
    errors = sum(case.find("error") is not None for case in cases)
    return len(cases) - failed - errors, failed, errors
