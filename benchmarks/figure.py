"""What a benchmark gives: one figure beside its target, and the values behind it. Knows nothing of how it came."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    """`value` and `target` are in `unit`; the target is met from above (`at_least`) or from below."""

    name: str
    meaning: str
    value: float
    unit: str
    target: float
    at_least: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        return self.value >= self.target if self.at_least else self.value <= self.target

    def line(self) -> str:
        """The figure in one line: what it is, its target, met or missed."""
        unit = f" {self.unit}" if self.unit else ""
        return (
            f"{self.name}: {self.meaning}: {self.value:.3g}{unit}, "
            f"target {'≥' if self.at_least else '≤'} {self.target:g}{unit}: {'met' if self.met else 'MISSED'}"
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}
