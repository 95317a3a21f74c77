"""From a model's answers to its results: figures with intervals, baselines, confusion, bins, groups. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core_training.foundation.errors import InputError
from evaluation.figures.metrics import BINS, Figure, Part, bins_of, confusion, metric
from evaluation.figures.statistics import Sums, interval
from evaluation.items import Answers, Item, Task

SITE = "site"


@dataclass(frozen=True)
class Grouping:
    """By which columns figures are given besides, and the fewest items of a cell that is shown."""

    by: tuple[str, ...] = ()
    suppress_below: int = 0


@dataclass
class Result:
    """One model's results on one task; `figures` are what they are functions of, for comparisons."""

    model: str
    task: str
    document: dict[str, Any]
    items: Sequence[Item]
    answers: Answers
    figures: dict[str, Figure] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()
    """The items of groups of which nothing is told."""


def result_of(model: str, task: Task, answers: Answers, grouping: Grouping) -> Result:
    """All that is to be told of a model on a task."""
    names = [name for name in task.metrics if _applies(name, answers)]
    figures = {name: metric(name).of(task.items, answers) for name in names}
    document: dict[str, Any] = {
        "model": model,
        "task": task.name,
        "n": len(task.items),
        "metrics": {name: _told(figures[name][1]) for name in names if len(figures[name][1])},
        "groups": {
            column: _grouped(column, task.items, figures, grouping.suppress_below)
            for column in _columns(task, grouping)
        },
    }
    if answers.scored:
        document |= _of_choices(task.items, answers, grouping.suppress_below)
        for name in ("accuracy", "accuracy_per_token", "accuracy_per_character"):
            if name in document["metrics"]:
                document["metrics"][name] |= {what: one["value"] for what, one in document["baselines"].items()}
    if answers.judged:
        verdicts = [verdict for one in answers.judged.values() for verdict in one.met]
        document["unjudged"] = {
            "criteria": verdicts.count(None),
            "of": len(verdicts),
            "answers": sum(None in one.met for one in answers.judged.values()),
        }
    document["left_out"] = dict(answers.left_out)
    document["notes"] = [*task.notes, *answers.notes, *_unjudged(document.get("unjudged"), len(answers.judged))]
    hidden = _hidden_items(_columns(task, grouping), task.items, grouping.suppress_below)
    return Result(model, task.name, document, task.items, answers, figures, hidden)


def _unjudged(told: dict[str, int] | None, judged: int) -> list[str]:
    """What is to be said of answers that the judge left without a verdict."""
    if not told or not told["answers"]:
        return []
    return [
        f"the judge gave no verdict on {told['criteria']} of {told['of']} criteria: {told['answers']} of {judged} "
        "answers count for nothing in rubric"
    ]


def _applies(name: str, answers: Answers) -> bool:
    kept = {Part.LOSS: answers.measured, Part.CHOICE: answers.scored, Part.ANSWER: answers.written}
    return bool(kept.get(metric(name).part, answers.judged))


def _columns(task: Task, grouping: Grouping) -> list[str]:
    """Those that were asked for and are there, and the sites where there are several."""
    several = len({item.site for item in task.items}) > 1
    by = [column for column in grouping.by if any(value_of(item, column) is not None for item in task.items)]
    return list(dict.fromkeys([*by, *([SITE] if several else [])]))


def _told(sums: Sums) -> dict[str, Any]:
    found = interval(sums)
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n}


def value_of(item: Item, column: str) -> str | None:
    """What an item has in a column; None where it has nothing there."""
    value = item.site if column == SITE else item.columns.get(column)
    return None if value is None or value == "" else str(value)


def check_columns(tasks: Sequence[Task], by: Sequence[str], option: str) -> None:
    """Raise InputError, with the option's name, for a column in which no item has anything."""
    items = [item for task in tasks for item in task.items]
    for column in by:
        if all(value_of(item, column) is None for item in items):
            known = dict.fromkeys([SITE, *(name for item in items for name in item.columns)])
            raise InputError(f"{option}{column}: no item has anything there; there are {', '.join(known)}")


def _grouped(column: str, items: Sequence[Item], figures: dict[str, Figure], least: int) -> dict[str, Any]:
    """Each value's figures. Cells with fewer items than `least` are not told."""
    by_item = {item.id: value_of(item, column) or "(none)" for item in items}
    sizes = Counter(by_item.values())
    hidden = hidden_cells(sizes, least)
    groups: dict[str, Any] = {}
    for value in sorted(sizes):
        if value in hidden:
            groups[value] = {"n": None, "suppressed": True, "metrics": {}}
            continue
        metrics = {}
        for name, (ids, sums) in figures.items():
            own = np.array([by_item[identifier] == value for identifier in ids], dtype=bool)
            if own.any():
                metrics[name] = _told(sums.only(own))
        groups[value] = {"n": sizes[value], "metrics": metrics}
    return groups


def hidden_cells(sizes: Counter[str], least: int) -> set[str]:
    """The cells that are not told: those below `least`, and, where that is but one, the smallest of the others too.

    One hidden cell alone would be the total minus all others.
    """
    hidden = {value for value, count in sizes.items() if count < least}
    if len(hidden) == 1 and len(sizes) > 1:
        hidden.add(min((value for value in sizes if value not in hidden), key=lambda value: (sizes[value], value)))
    return hidden


def worst(result: Result, name: str, column: str, *, largest: bool) -> tuple[float, bool] | None:
    """The largest (or smallest) of a figure over all of a column's groups, and whether its group is one that is told.

    None where no group has the figure.
    """
    groups, (ids, sums) = result.document["groups"].get(column, {}), result.figures[name]
    by_item = {item.id: value_of(item, column) or "(none)" for item in result.items}
    found = []
    for group, told in groups.items():
        own = np.array([by_item[identifier] == group for identifier in ids], dtype=bool)
        if own.any() and not math.isnan(value := sums.only(own).value):
            found.append((value, not told.get("suppressed", False)))
    return (max if largest else min)(found, default=None, key=lambda one: one[0])


def _hidden_items(columns: Sequence[str], items: Sequence[Item], least: int) -> frozenset[str]:
    """The items of all cells that are not told."""
    found: set[str] = set()
    for column in columns:
        by_item = {item.id: value_of(item, column) or "(none)" for item in items}
        hidden = hidden_cells(Counter(by_item.values()), least)
        found |= {identifier for identifier, value in by_item.items() if value in hidden}
    return frozenset(found)


def _hidden_counts(counts: list[list[int]], majority: int, least: int) -> set[tuple[int, int]]:
    """The cells of a confusion table that are not told: those of few items, and what would give one of these away.

    n and the accuracy tell the sums on and off the diagonal, and the majority answer's share that of its row: a cell
    that were hidden alone in one of them would be what the others leave.
    """
    cells = {(row, column): cell for row, line in enumerate(counts) for column, cell in enumerate(line)}
    hidden = {place for place, cell in cells.items() if 0 < cell < least}
    known = [
        [place for place in cells if place[0] == place[1]],
        [place for place in cells if place[0] != place[1]],
        [place for place in cells if place[0] == majority],
    ]
    while alone := next((p for p in known if len(p) > 1 and sum(place in hidden for place in p) == 1), None):
        others = [place for place in alone if place not in hidden]
        hidden.add(min(others, key=lambda place: (not cells[place], cells[place], place)))
    return hidden


def _of_choices(items: Sequence[Item], answers: Answers, least: int) -> dict[str, Any]:
    pairs = [(item, answers.scored[item.id]) for item in items if item.gold is not None and item.id in answers.scored]
    labels, table = confusion(items, answers)
    right = Counter(item.expected for item, _ in pairs)
    majority, most = max(right.items(), key=lambda one: (one[1], str(one[0])))
    bins = bins_of(pairs).sum(axis=0).reshape(3, BINS)
    hidden = _hidden_counts(table, labels.index(str(majority)), least)
    few = hidden_cells(Counter({str(number): int(n) for number, n in enumerate(bins[0]) if n}), least)
    return {
        "baselines": {
            "majority": {"value": most / len(pairs), "answer": majority},
            "random": {"value": sum(1 / len(item.choices) for item, _ in pairs) / len(pairs)},
        },
        "confusion": {
            "labels": labels,
            "rows": "right",
            "columns": "chosen",
            "counts": [
                [None if (at, to) in hidden else cell for to, cell in enumerate(row)] for at, row in enumerate(table)
            ],
        },
        "calibration": [
            {
                "low": number / BINS,
                "high": (number + 1) / BINS,
                "n": int(n),
                "confidence": sure / n,
                "accuracy": correct / n,
            }
            for number, (n, sure, correct) in enumerate(bins.T.tolist())
            if n and str(number) not in few
        ],
    }
