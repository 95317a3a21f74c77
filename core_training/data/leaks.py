"""Held-out answers that are learnt in training: they make an evaluation better than it is."""

from __future__ import annotations

from dataclasses import dataclass, field

from core_training.data.examples import IGNORED, Example

LEAST_TOKENS = 16
"""Shorter answers, such as a yes, are the same by chance."""


@dataclass
class Leaks:
    """A count over examples: how many held-out ones have an answer that stands in training, word for word."""

    _trained: set[int] = field(default_factory=set)
    _held_out: list[int] = field(default_factory=list)

    def add(self, example: Example, *, held_out: bool) -> None:
        """Take an example into account."""
        for tokens in example.sequences:
            learnt = tokens.input_ids[tokens.labels != IGNORED]
            if len(learnt) >= LEAST_TOKENS:
                text = hash(learnt.tobytes())
                self._held_out.append(text) if held_out else self._trained.add(text)

    @property
    def count(self) -> int:
        """The held-out answers that are learnt, too."""
        return sum(text in self._trained for text in self._held_out)

    @property
    def share(self) -> float:
        """Their share of all held-out answers of some length."""
        return self.count / len(self._held_out) if self._held_out else 0.0

    def warning(self) -> str:
        """A sentence on them; empty where there are none."""
        if not self.count:
            return ""
        return (
            f"{self.count} held-out answers ({self.share:.0%}) stand word for word in training, with other questions; "
            "the evaluation will look better than it is: hold out whole files instead (data.eval), or remove copies"
        )
