"""Gates: what a figure of a step has to be before the pipeline goes on, as `<= 3.0` or `<= sft + 0.1`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from core_training.foundation.bounded_reading import shortened
from core_training.foundation.errors import InputError

_RELATIONS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_CHANGES: Mapping[str, Callable[[float, float], float]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_GATE = re.compile(
    rf"\s*(?P<relation><=|>=|<|>)\s*"
    rf"(?:(?P<number>{_NUMBER})|(?P<step>[A-Za-z][\w-]*)(?:\s+(?P<change>[-+*])\s*(?P<by>{_NUMBER}))?)\s*"
)


@dataclass(frozen=True)
class Gate:
    """A condition on the figure `figure`: it stands in `relation` to a number, or to the same figure of `step`.

    Of a step, the figure is changed by a number first (`change`: +, -, *).
    """

    figure: str
    text: str
    relation: str
    number: float
    step: str | None = None
    change: str = "+"

    def limit(self, of_step: Callable[[str], float]) -> float:
        """The number that the figure is held against; `of_step` gives the same figure of another step."""
        return self.number if self.step is None else _CHANGES[self.change](of_step(self.step), self.number)

    def passes(self, value: float, limit: float) -> bool:
        """Whether a value stands in the relation to the limit; what is no number does not."""
        return _RELATIONS[self.relation](value, limit)


def parse_gate(figure: str, text: object, place: str) -> Gate:
    """The gate that a text describes. Raises InputError for a text that is none."""
    match = _GATE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise InputError(
            f"{place}: {shortened(text)} is no gate; write '<= 3.0', or with a step before this one '<= sft + 0.1'"
        )
    if match["step"] is None:
        return Gate(figure, match[0].strip(), match["relation"], float(match["number"]))
    change, by = match["change"] or "+", float(match["by"] or 0)
    return Gate(figure, match[0].strip(), match["relation"], by, match["step"], change)
