"""Answers of a candidate and a reference that both bridges are tried on, and figures of them by other ways."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev

from core_training.data.records import Record
from evaluation.bridges.answer_rows import AnswerRow
from evaluation.items import Item

_EXPECTED = [
    "Metformin lowers glucose.",
    "Take it with food.",
    "{{ 7 * 7 }} is no template, nor is {% if %}.",
    "Call an ambulance.",
    'It says: "yes", and #no.',
    "Twice a day",
]
_REFUSAL = "I cannot help with that, as a language model."


def item(identifier: str, prompt: str, expected: str) -> Item:
    record = Record({}, Path("rows.jsonl"), 1)
    return Item(identifier, record, "", [{"role": "user", "content": prompt}], references=(expected,))


def _rows(answers: Sequence[str], model: str) -> list[AnswerRow]:
    return [
        AnswerRow(f"q{number}", 0, f"Question {number}: {{{{ env.HOME }}}}?", answer, _EXPECTED[number % 6], model, "t")
        for number, answer in enumerate(answers)
    ]


CANDIDATE = _rows(
    [_REFUSAL if number == 4 else _EXPECTED[number % 6] + " That is all." * (number % 3 == 1) for number in range(12)],
    "candidate",
)
REFERENCE = _rows(
    [_REFUSAL if number % 4 == 0 else "Perhaps. " + _EXPECTED[number % 6] for number in range(12)], "reference"
)


def lengths(rows: Sequence[AnswerRow]) -> list[float]:
    return [float(len(row.answer)) for row in rows]


def exact(rows: Sequence[AnswerRow]) -> list[bool]:
    return [row.answer == row.expected for row in rows]


def matching(rows: Sequence[AnswerRow], pattern: str) -> list[bool]:
    return [re.search(pattern, row.answer) is not None for row in rows]


def wasserstein(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The first Wasserstein distance of two samples of one size, in the reference's standard deviations."""
    gaps = [abs(one - other) for one, other in zip(sorted(ours), sorted(theirs), strict=True)]
    return fmean(gaps) / pstdev(theirs)


def jensen_shannon(ours: Sequence[bool], theirs: Sequence[bool]) -> float:
    """The square root of the Jensen-Shannon divergence (nats) of two shares."""
    p, q = fmean(ours), fmean(theirs)
    pairs = [(p, q), (1 - p, 1 - q)]
    parts = [one * math.log(2 * one / (one + other)) for pair in pairs for one, other in (pair, pair[::-1]) if one]
    return math.sqrt(sum(parts) / 2)
