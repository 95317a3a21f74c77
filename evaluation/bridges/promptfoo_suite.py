"""A suite for promptfoo: its configuration, cases, provider and checks as files. Pure but for the files it copies from.

The texts of records never stand where promptfoo looks for templates or files: templates are switched off, cases are
named by number, and what promptfoo would take for a file's name is left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from core_training.foundation.bounded_reading import shortened
from core_training.foundation.errors import InputError
from core_training.foundation.places import is_folder
from core_training.foundation.strict_json import strict_json
from evaluation.bridges.answer_rows import AnswerRow
from evaluation.bridges.own_environments import PINS

CONFIGURATION = "promptfooconfig.yaml"
PROVIDER = "provider.py"
CHECK = "check.py"
CASES = "cases.jsonl"
_KINDS = {"contains": "icontains", "exact_match": "equals", "rouge_1": "rouge-n"}
"""Checks against what was expected, and what promptfoo calls them."""
_NEEDS_THRESHOLD = "rouge_1"
_USUAL_THRESHOLD = 0.5
_REGEX = "regex:"
_PATIENCE = 900_000
"""Milliseconds within which a model is loaded and has answered."""
_FILES = ("file://", "package:", "python:", "javascript:")
"""Beginnings of texts that promptfoo reads as something to load."""
_OWN = re.compile(r"(?P<file>[^:]+\.py):(?P<function>[A-Za-z_]\w*)")
_THRESHOLD = re.compile(r"(?P<name>.*\S)\s*>=\s*(?P<value>\d+\.?\d*|\.\d+)\s*", re.DOTALL)


@dataclass(frozen=True)
class Check:
    """One check of each answer: `contains`, `exact_match`, `rouge_1`, `regex:PATTERN`, or `FILE.py:name`.

    A function is one of (prompts, completions), as those of `evaluate --metrics`; it passes from `threshold` on.
    """

    name: str
    threshold: float = _USUAL_THRESHOLD

    @property
    def own(self) -> tuple[Path, str] | None:
        """The file and the name of a function of the person's own."""
        found = _OWN.fullmatch(self.name)
        return None if found is None else (Path(found["file"]), found["function"])

    @property
    def needs_expected(self) -> bool:
        return self.name in _KINDS


@dataclass(frozen=True)
class Contestant:
    """Who answers: by answers that were kept, or, where it `is_asked`, the model of that name, which is loaded.

    `base` and `site` are what loading it takes besides (as `evaluate --base` and `--site`), `max_tokens` its longest
    answer.
    """

    name: str
    answers: Sequence[AnswerRow] = ()
    is_asked: bool = False
    max_tokens: int = 256
    base: Path | None = None
    site: str | None = None


@dataclass(frozen=True)
class Suite:
    """The files by name, how many cases they have, and why others are not among them."""

    files: Mapping[str, str]
    cases: int
    left_out: Mapping[str, int]


def parse_check(text: str) -> Check:
    """The check that a text names, with `>= THRESHOLD` behind it where it is wanted. Raises InputError."""
    found = _THRESHOLD.fullmatch(text)
    name, threshold = (found["name"], float(found["value"])) if found else (text.strip(), _USUAL_THRESHOLD)
    check = Check(name, threshold)
    if name.startswith(_REGEX):  # which may have a >= of its own, and is met or not
        return Check(_with_pattern(text.strip()))
    if (name in _KINDS or check.own) and (not found or name == _NEEDS_THRESHOLD or check.own):
        return check
    if name in _KINDS:
        raise InputError(f"{shortened(text)}: {name} is met or not; leave the threshold out")
    raise InputError(
        f"{shortened(text)} is no check for promptfoo: there are {', '.join(_KINDS)}, regex:PATTERN and FILE.py:name; "
        f"the last and rouge_1 with `>= THRESHOLD` behind them where it is not {_USUAL_THRESHOLD}"
    )


def _with_pattern(name: str) -> str:
    try:
        re.compile(name.removeprefix(_REGEX))
    except re.error as error:
        raise InputError(f"{shortened(name)}: it is no regular expression: {error}") from None
    return name


def suite_of(contestants: Sequence[Contestant], questions: Sequence[AnswerRow], checks: Sequence[Check]) -> Suite:
    """The suite that asks every contestant every question; `questions` are answers of whom does not matter.

    Raises InputError where there is nothing to ask or to check, and for checks that cannot be made.
    """
    if not checks:
        raise InputError(
            "promptfoo has nothing to check: name contains, exact_match, rouge_1, regex:PATTERN, FILE.py:name"
        )
    names = [one.name for one in contestants]
    if len(set(names)) < len(names):
        raise InputError(f"two models are called {max(names, key=names.count)}; call one otherwise")
    for check in checks:
        if check.own and not check.own[0].is_file():
            raise InputError(f"{check.name}: there is no file {check.own[0]}; name one, as FILE.py:name")
    cases, left_out = _cases(contestants, questions, checks)
    if not cases:
        raise InputError(f"promptfoo has nothing to ask: {_told(left_out)}")
    lines = [strict_json(case, ensure_ascii=False) + "\n" for case in cases]
    files = {
        CONFIGURATION: yaml.safe_dump(_configuration(contestants, cases, checks), sort_keys=False, allow_unicode=True),
        PROVIDER: (PINS / "promptfoo_provider.py").read_text(encoding="utf-8"),
        CASES: "".join(lines),
    }
    if any(check.own for check in checks):
        files[CHECK] = (PINS / "promptfoo_check.py").read_text(encoding="utf-8")
    return Suite(files, len(cases), left_out)


def _cases(
    contestants: Sequence[Contestant], questions: Sequence[AnswerRow], checks: Sequence[Check]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    kept = {
        one.name: {(row.id, row.sample): row.answer for row in one.answers} for one in contestants if not one.is_asked
    }
    needs_expected = any(check.needs_expected for check in checks)
    cases: list[dict[str, Any]] = []
    left_out: dict[str, int] = {}
    for row in questions:
        if reason := _hindrance(row, needs_expected=needs_expected):
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        answers = {name: found.get((row.id, row.sample)) for name, found in kept.items()}
        case = {"case": f"case-{len(cases)}", "id": row.id, "sample": row.sample, "prompt": row.prompt}
        cases.append({**case, "expected": row.expected, "answers": answers})
    return cases, left_out


def _hindrance(row: AnswerRow, *, needs_expected: bool) -> str | None:
    if needs_expected and not row.expected:
        return "nothing was expected"
    if (row.expected or "").startswith(_FILES):
        return "promptfoo would load what was expected as a file"
    return None


def _told(left_out: Mapping[str, int]) -> str:
    return "; ".join(f"of {count} questions {reason}" for reason, count in left_out.items()) or "there are no questions"


def _configuration(
    contestants: Sequence[Contestant], cases: Sequence[dict[str, Any]], checks: Sequence[Check]
) -> dict[str, Any]:
    return {
        "description": "fedloom evaluate",
        "sharing": False,
        # Each case's question is in cases.jsonl, where the provider looks it up.
        "prompts": [{"raw": "the question of the case", "label": "question"}],
        "providers": [{"id": f"file://{PROVIDER}", "label": one.name, "config": _asked(one)} for one in contestants],
        "tests": [_test(case, checks) for case in cases],
    }


def _asked(contestant: Contestant) -> dict[str, Any]:
    if not contestant.is_asked:
        return {"answers": contestant.name}
    # One process, so that the model is in memory once, and time to load it.
    return {
        "model": _place(contestant.name),
        "base": _place(str(contestant.base)) if contestant.base else None,
        "site": contestant.site,
        "max_tokens": contestant.max_tokens,
        "workers": 1,
        "timeout": _PATIENCE,
    }


def _place(name: str) -> str:
    """A folder by its whole path; promptfoo runs in another one. A hub's name stays."""
    return str(Path(name).resolve()) if is_folder(name) else name


def _test(case: dict[str, Any], checks: Sequence[Check]) -> dict[str, Any]:
    return {
        "description": case["id"],
        "vars": {"case": case["case"]},
        "assert": [_assertion(check, case) for check in checks],
    }


def _assertion(check: Check, case: dict[str, Any]) -> dict[str, Any]:
    if check.own:
        path, function = check.own
        config = {"file": str(path.resolve()), "function": function, "threshold": check.threshold}
        return {"type": "python", "value": f"file://{CHECK}", "metric": check.name, "config": config}
    if check.name.startswith(_REGEX):
        return {"type": "regex", "value": check.name.removeprefix(_REGEX), "metric": check.name}
    told: dict[str, Any] = {"type": _KINDS[check.name], "value": case["expected"], "metric": check.name}
    return {**told, "threshold": check.threshold} if check.name == _NEEDS_THRESHOLD else told
