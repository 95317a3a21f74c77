"""Tests that a person named: `NAME COMPARISON VALUE`, as in `exact_match >= reference + 0.02`. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from core_training.foundation.bounded_reading import shortened
from core_training.foundation.errors import InputError

COMPARISONS = (">=", "<=", ">", "<")
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
# The last comparison counts: a regular expression may have some of its own.
_TEST = re.compile(
    rf"\s*(?P<name>.*\S)\s*(?<![<>=])(?P<comparison>>=|<=|>|<)\s*"
    rf"(?:(?P<number>{_NUMBER})|(?:reference|base)(?:\s*(?P<sign>[-+])\s*(?P<offset>{_NUMBER}))?)\s*",
    re.DOTALL,
)


@dataclass(frozen=True)
class NamedTest:
    """What a figure has to be: `value`, or the reference's own figure plus `value` where it `is_relative`."""

    figure: str
    comparison: str
    value: float
    is_relative: bool = False

    @property
    def name(self) -> str:
        """The test in words, the same for all ways to write it."""
        if not self.is_relative:
            return f"{self.figure} {self.comparison} {self.value:g}"
        sign = "-" if self.value < 0 else "+"
        return f"{self.figure} {self.comparison} reference" + (f" {sign} {abs(self.value):g}" if self.value else "")


def parse_test(text: str) -> NamedTest:
    """The test that a text names. Raises InputError for any other text."""
    found = _TEST.fullmatch(text)
    if found is None:
        raise InputError(
            f"{shortened(text)} is no test: write NAME, one of {' '.join(COMPARISONS)}, and a number or `reference + "
            "number`, as in `exact_match >= 0.5` or `refusal <= reference + 0.02`"
        )
    if found["number"] is not None:
        return NamedTest(found["name"], found["comparison"], float(found["number"]))
    offset = float((found["sign"] or "") + (found["offset"] or "0"))
    return NamedTest(found["name"], found["comparison"], offset, is_relative=True)
