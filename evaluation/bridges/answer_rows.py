"""The answers of one model on one task, as `answers.jsonl` has them, for programs that judge texts.

What is no answer in words there (losses, verdicts, values) is passed over; a choice counts as the label that was
chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core_training.foundation.bounded_reading import (
    ForeignTextError,
    parse_value,
    read_lines,
    reason_of,
    shortened,
    shortened_text,
)
from core_training.foundation.errors import InputError

ANSWERS = "answers.jsonl"
_IN_WORDS = ("answer", "choice")
"""The parts of an evaluation that give answers in words; a line that names no part is one."""


@dataclass(frozen=True)
class AnswerRow:
    """One answer; `sample` counts the answers to one question, `expected` is None where nothing is."""

    id: str
    sample: int
    prompt: str
    answer: str
    expected: str | None
    model: str = ""
    task: str = ""


def read_answers(place: Path, model: str | None = None, task: str | None = None) -> list[AnswerRow]:
    """The answers in a file, or in the `answers.jsonl` of a folder, of `model` and `task` alone where they are named.

    Raises InputError where a line is no answer, where there are none, where one is there twice, and where those of
    several models or tasks lie there and none is named.
    """
    path = place / ANSWERS if place.is_dir() else place
    rows = [row for row in _rows(path) if (model is None or row.model == model) and (task is None or row.task == task)]
    if not rows:
        asked = "".join(f" of {what} {name}" for what, name in (("model", model), ("task", task)) if name is not None)
        raise InputError(f"{path}: there are no answers in words{asked}; evaluate with a metric of answers first")
    _check_one(path, "models", {row.model for row in rows})
    _check_one(path, "tasks", {row.task for row in rows})
    seen: set[tuple[str, int]] = set()
    for row in rows:
        if (row.id, row.sample) in seen:
            raise InputError(f"{path}: {shortened(row.id)} has two answers of number {row.sample}; each counts once")
        seen.add((row.id, row.sample))
    return rows


def _check_one(path: Path, what: str, names: set[str]) -> None:
    if len(names) > 1:
        told = ", ".join(shortened_text(name, 60) for name in sorted(names)[:5])
        raise InputError(f"{path}: answers of {len(names)} {what} lie there ({told}); name one of them")


def _rows(path: Path) -> Sequence[AnswerRow]:
    rows = []
    try:
        for number, line in enumerate(read_lines(path), 1):
            if line.strip() and (row := _row(f"{path}, line {number}", line)) is not None:
                rows.append(row)
    except OSError as error:
        raise InputError(f"{path}: {reason_of(error)}; name the folder of an evaluation, or its {ANSWERS}") from None
    return rows


def _row(place: str, line: bytes) -> AnswerRow | None:
    try:
        found: Any = parse_value(line)
    except (ForeignTextError, ValueError) as error:
        raise InputError(f"{place}: not valid JSON: {shortened_text(error, 120)}") from None
    if not isinstance(found, dict):
        raise InputError(f"{place}: {shortened(found)} is no answer; a line is an object with id, prompt and answer")
    if found.get("part", "answer") not in _IN_WORDS or found.get("answer", "") is None:
        return None
    for key in ("id", "prompt", "answer"):
        if not isinstance(found.get(key), str):
            raise InputError(f"{place}: {key} is {shortened(found.get(key))}; it has to be text")
    expected, sample = found.get("expected"), found.get("sample", 0)
    if not (expected is None or isinstance(expected, str)):
        raise InputError(f"{place}: expected is {shortened(expected)}; it has to be text, or null")
    if not isinstance(sample, int):
        raise InputError(f"{place}: sample is {shortened(sample)}; it has to be a whole number")
    model, task = (str(found.get(key) or "") for key in ("model", "task"))
    return AnswerRow(found["id"], sample, found["prompt"], found["answer"], expected, model, task)
