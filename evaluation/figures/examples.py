"""The worst and best items of models on one task, for people who want to see what figures are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.figures.metrics import chosen, confidence, metric
from evaluation.figures.results import Result
from evaluation.items import Item

_RANKED_BY = ("reward", "rubric", "token_f1", "rouge_l", "exact_match", "number_match", "accuracy", "loss")


@dataclass(frozen=True)
class Example:
    """An item with each model's answer, in the order of the models, and the first model's value of the figure."""

    item: Item
    value: float
    answers: tuple[str, ...]


def ranked_by(result: Result) -> str | None:
    """The figure that a result's items are ranked by; None where it has none that says which answer is better."""
    own = next((name for name in result.figures if ":" in name), None)
    found = [name for name in _RANKED_BY if name in result.figures and len(result.figures[name][1])]
    return found[0] if found else own


def worst_and_best(results: Sequence[Result], count: int) -> tuple[str, list[Example], list[Example]] | None:
    """The figure's name, and so many items that the first result does worst and best on; all results are of one task.
    Items of groups that are not told are none of them.

    A multiple choice is worse the surer a wrong answer is.
    """
    first = results[0]
    if (name := ranked_by(first)) is None:
        return None
    ids, sums = first.figures[name]
    by_id = {item.id: item for item in first.items}
    with np.errstate(divide="ignore", invalid="ignore"):
        values = dict(zip(ids, sums.of(sums.values).tolist(), strict=True))
    sign = -1.0 if metric(name).higher_is_better is False else 1.0

    def rank(identifier: str) -> tuple[float, float]:
        scored = first.answers.scored.get(identifier)
        sure = 0.0 if scored is None or name != "accuracy" else confidence(scored)
        return sign * values[identifier], sure if values[identifier] else -sure

    order = sorted((name for name in ids if values[name] == values[name] and name not in first.hidden), key=rank)
    made = [Example(by_id[one], values[one], tuple(answer(r, by_id[one]) for r in results)) for one in order]
    worst = made[:count]
    return name, worst, made[: max(len(worst), len(made) - count) - 1 : -1]


def answer(result: Result, item: Item) -> str:
    """What a model gave on an item, in words."""
    if (scored := result.answers.scored.get(item.id)) is not None:
        return f"{item.labels[chosen(item, scored)]} ({confidence(scored):.0%})"
    if (written := result.answers.written.get((item.id, 0))) is not None:
        return written.text if written.ended else f"{written.text} …"
    if (measured := result.answers.measured.get(item.id)) is not None and measured.tokens:
        return f"loss {measured.loss_sum / measured.tokens:.3f}"
    return "–"
