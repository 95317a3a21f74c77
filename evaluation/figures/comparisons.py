"""Models against others on the same items: differences of all figures, with p adjusted for how many there are. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.figures.metrics import Figure
from evaluation.figures.results import Result
from evaluation.figures.statistics import Difference, difference, holm


@dataclass(frozen=True)
class Comparison:
    """A figure of `model` minus that of `against`; `adjusted` is p by Holm over all comparisons of the call."""

    model: str
    against: str
    task: str
    metric: str
    difference: Difference
    adjusted: float = 1.0

    def document(self) -> dict[str, object]:
        found = self.difference
        return {
            "model": self.model,
            "against": self.against,
            "task": self.task,
            "metric": self.metric,
            "difference": found.value,
            "low": found.low,
            "high": found.high,
            "p": found.p,
            "p_holm": self.adjusted,
            "method": found.method,
            "n": found.n,
        }


def paired(ours: Figure, theirs: Figure) -> Difference:
    """The difference of a figure over the items that both have."""
    places = {name: place for place, name in enumerate(theirs[0])}
    common = [(row, places[name]) for row, name in enumerate(ours[0]) if name in places]
    rows, others = (np.array([pair[side] for pair in common], dtype=int) for side in (0, 1))
    return difference(ours[1].only(rows), theirs[1].only(others))


def compared(results: Sequence[Result], models: Sequence[str], against: Sequence[str]) -> list[Comparison]:
    """Each of `models` against each of `against`, in every figure that both have."""
    by_key = {(result.model, result.task): result for result in results}
    found = []
    for ours in results:
        for other in against if ours.model in models else ():
            theirs = by_key.get((other, ours.task))
            if theirs is None or theirs is ours:
                continue
            found += [
                Comparison(ours.model, other, ours.task, name, paired(figure, theirs.figures[name]))
                for name, figure in ours.figures.items()
                if name in theirs.figures and len(figure[1]) and len(theirs.figures[name][1])
            ]
    known = [number for number, one in enumerate(found) if one.difference.p == one.difference.p]
    adjusted = dict(zip(known, holm([found[number].difference.p for number in known]), strict=True))
    return [
        Comparison(one.model, one.against, one.task, one.metric, one.difference, adjusted.get(number, float("nan")))
        for number, one in enumerate(found)
    ]
