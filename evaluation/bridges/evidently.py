"""The bridge to Evidently: a report of its own on a model's answers, against a reference's, with tests that were named.

Evidently needs libraries that do not go with fedloom's, so it runs in an environment apart, as a process that is given
JSON and no network. This file imports nothing of it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core_training.foundation.bounded_reading import shortened
from core_training.foundation.durable import commit_folder, new_folder
from core_training.foundation.errors import InputError, RunError
from core_training.foundation.strict_json import strict_json
from evaluation.bridges.answer_rows import AnswerRow
from evaluation.bridges.evidently_results import EvidentlyResults, read_results
from evaluation.bridges.foreign_programs import Program, fence, last_words, run_alone
from evaluation.bridges.named_tests import NamedTest
from evaluation.bridges.own_environments import PINS, Maker, OwnEnvironment, Say
from evaluation.figures.words import refuses

SECONDS = 600.0
"""Seconds that a report may take."""
DRIFT = {"numerical": "wasserstein", "categorical": "jensenshannon", "threshold": 0.1}
"""How drift is measured, at any number of answers: Evidently's own choice changes with it, from p to a distance."""
FIGURES = "figures.json"
_REGEX = "regex:"
_DRIFT = "drift."
_SHARES = ("exact_match", "refusal")
_NUMBERS = ("length", "words")
_STATISTICS = ("mean", "median", "min", "max")


def _fill(maker: Maker) -> None:
    maker.install(PINS / "evidently.txt")
    maker.do("evidently", [maker.python, "-I", "-c", "import evidently.presets"], {"DO_NOT_TRACK": "1"})


ENVIRONMENT = OwnEnvironment(
    name="evidently",
    title="Evidently",
    size="1 GB",
    option="--evidently-env",
    variable="FEDLOOM_EVIDENTLY_ENV",
    pins=("evidently.txt",),
    program="bin/python",
    fill=_fill,
)


@dataclass(frozen=True)
class _Asked:
    """A test in Evidently's terms: a column, and the statistic of it."""

    column: str
    statistic: str
    comparison: str
    value: float
    is_relative: bool


def check_tests(tests: Sequence[NamedTest], *, has_reference: bool) -> None:
    """Raise InputError for a test of what Evidently is not asked, or against a reference that is not there."""
    for test in tests:
        asked = _asked(test)
        if not has_reference and (test.is_relative or asked.statistic == "drift"):
            raise InputError(f"'{test.name}' needs a model to compare with; name one with --against")


def write_report(
    to: Path,
    candidate: Sequence[AnswerRow],
    reference: Sequence[AnswerRow] | None,
    tests: Sequence[NamedTest] = (),
    patterns: Sequence[str] = (),
    environment: Path | None = None,
    say: Say = lambda _: None,
) -> EvidentlyResults:
    """Have Evidently write report.html and report.json into the new folder `to`, and read its numbers back.

    `patterns` are regular expressions to look for in answers, besides those in tests' names. Raises InputError for what
    cannot be asked or installed, and RunError where Evidently fails; tests that fail are a result and no error.
    """
    check_tests(tests, has_reference=reference is not None)
    folder = new_folder(to, "--evidently")
    request, notes = _request(candidate, reference, tests, patterns)
    home = ENVIRONMENT.ready(environment, say)
    with commit_folder(folder) as scratch:
        (scratch / "request.json").write_text(strict_json(request, ensure_ascii=False), encoding="utf-8")
        _run(home, scratch)
        results = read_results(scratch, tests, offline=bool(fence()), notes=notes)
        (scratch / FIGURES).write_text(strict_json(results.document(), indent=2) + "\n", encoding="utf-8")
    return results


def _run(home: Path, folder: Path) -> None:
    # -I: no folder of ours on the path, whose files have names that its libraries import.
    command = [str(home / "bin" / "python"), "-I", str(PINS / "evidently_report.py"), "request.json", "."]
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        settings = {"DO_NOT_TRACK": "1", "HOME": scratch, "MPLBACKEND": "agg"}
        if code := run_alone(Program("Evidently", command, folder, settings, SECONDS), log):
            raise RunError(f"Evidently ended with code {code} and said: {last_words(log)}")


def _request(
    candidate: Sequence[AnswerRow],
    reference: Sequence[AnswerRow] | None,
    tests: Sequence[NamedTest],
    patterns: Sequence[str],
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What Evidently is to do, in JSON, and what a person should know of it."""
    notes: list[str] = []
    asked = [_asked(test) for test in tests]
    named = [one.column.removeprefix(_REGEX) for one in asked if one.column.startswith(_REGEX)]
    descriptors = [{"name": name, "kind": name} for name in _NUMBERS]
    everything = [*candidate, *(reference or [])]
    if unknown := sum(row.expected is None for row in everything):
        if any(one.column == "exact_match" for one in asked):
            raise InputError(f"a test asks for exact_match, and {unknown} answers have nothing that was expected")
        notes.append(f"no exact_match: {unknown} of {len(everything)} answers have nothing that was expected")
    else:
        descriptors.append({"name": "exact_match", "kind": "exact_match"})
    for pattern in dict.fromkeys([*patterns, *named]):
        _check_pattern(pattern)
        descriptors.append({"name": _REGEX + pattern, "kind": "regex", "pattern": pattern})
    if reference is not None:
        notes += _differences(candidate, reference)
    names = [one["name"] for one in descriptors]
    return {
        "candidate": [_row(row) for row in candidate],
        "reference": None if reference is None else [_row(row) for row in reference],
        "descriptors": descriptors,
        "given": ["refusal"],
        "shares": [*(name for name in names if name not in _NUMBERS), "refusal"],
        "drift": DRIFT,
        "tests": [asdict(one) for one in asked],
    }, tuple(notes)


def _row(row: AnswerRow) -> dict[str, Any]:
    return {
        "id": f"{row.id}#{row.sample}" if row.sample else row.id,
        "prompt": row.prompt,
        "answer": row.answer,
        "expected": row.expected or "",
        "refusal": bool(refuses(row.answer)),
    }


def _differences(candidate: Sequence[AnswerRow], reference: Sequence[AnswerRow]) -> list[str]:
    ours, theirs = ({(row.id, row.sample) for row in rows} for rows in (candidate, reference))
    if ours == theirs:
        return []
    return [
        f"{len(ours - theirs)} answers have none of the reference beside them, and {len(theirs - ours)} the reverse"
    ]


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"{shortened(_REGEX + pattern)}: it is no regular expression: {error}") from None


def _asked(test: NamedTest) -> _Asked:
    figure, statistic = test.figure, "mean"
    if figure.startswith(_DRIFT):
        figure, statistic = figure.removeprefix(_DRIFT), "drift"
        if test.is_relative:
            raise InputError(f"'{test.name}': drift is a distance from the reference already; hold it against a number")
    elif not figure.startswith(_REGEX) and "." in figure:
        figure, _, statistic = figure.partition(".")
    is_share = figure in _SHARES or figure.startswith(_REGEX)
    known = ("mean", "drift") if is_share else (*_STATISTICS, "drift")
    if (not is_share and figure not in _NUMBERS) or statistic not in known:
        raise InputError(
            f"{shortened(test.figure)}: Evidently is asked for {', '.join((*_NUMBERS, *_SHARES))} and regex:PATTERN; "
            f"{' and '.join(_NUMBERS)} may have .{' .'.join(_STATISTICS)} behind them, and each drift. before it"
        )
    if figure.startswith(_REGEX):
        _check_pattern(figure.removeprefix(_REGEX))
    return _Asked(figure, statistic, test.comparison, test.value, test.is_relative)
