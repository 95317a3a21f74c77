"""What the steps of a pipeline found that evaluate and compare: their own pages, and their figures for the whole's."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core_training.foundation.bounded_reading import ForeignTextError, read_json
from evaluation.figures.results import Result
from evaluation.items import Answers
from experiments.steps.evaluate_step import Evaluated
from fedloom.comparison_page import RATING_COLUMNS, pair_words, rating_rows
from fedloom.comparison_page import write_report as write_comparison
from fedloom.evaluation_page import figures_table, shown
from fedloom.evaluation_page import write_report as write_evaluation
from fedloom.page import table

_MOST = 4
"""Figures of a step that its line has; its own part of the page has all."""


def write_step_report(found: object) -> None:
    """Write the page of what a step found, as the command of its name does. Raises RunError when the disk refuses."""
    from evaluation.pairs.contest import Compared

    if isinstance(found, Evaluated):
        write_evaluation(found.evaluation, found.verdicts)
    elif isinstance(found, Compared):
        write_comparison(found)


def read_results(folder: Path) -> dict[str, Any] | None:
    """The results that a step left in its folder; None where it left none."""
    try:
        document = read_json(folder / "results.json")
    except (OSError, ForeignTextError):
        return None
    return document if isinstance(document, dict) else None


def in_a_line(document: Mapping[str, Any]) -> str:
    """The first model's figures with their intervals."""
    if "results" not in document:
        return _of_comparison(document)
    results = [one for one in _results(document) if one.model == document["results"][0]["model"]]
    several = len(results) > 1
    told = [
        f"{one.task + '.' if several else ''}{name} {shown(value)}"
        for one in results
        for name, value in one.document["metrics"].items()
    ]
    return ", ".join(told[:_MOST]) + (", …" if len(told) > _MOST else "")


def _of_comparison(document: Mapping[str, Any]) -> str:
    first = document["models"][0]
    pairs = [one["p_holm"] for one in document["pairs"] if first["model"] in (one["model"], one["against"])]
    p = max((p for p in pairs if p is not None), default=None)
    words = [f"{Path(first['model']).name} won {_told(first['win_rate'], 100, '.0f')} %"]
    words.append(f"rating {_told(first['rating'])} [{_told(first['low'])}, {_told(first['high'])}]")
    return ", ".join([*words, f"p {_told(p, 1, '.3g')}"])


def _told(value: float | None, times: float = 1, form: str = ".0f") -> str:
    return "–" if value is None else f"{times * value:{form}}"


def in_full(document: Mapping[str, Any]) -> list[str]:
    """All models' figures as parts of a page."""
    if "results" not in document:
        pairs = [f"<p>{html.escape(words)}</p>" for words in pair_words(document)]
        return [table(RATING_COLUMNS, rating_rows(document)), *pairs]
    parts = []
    results = _results(document)
    for task in dict.fromkeys(one.task for one in results):
        own = [one for one in results if one.task == task]
        parts.append(f"<p>{html.escape(task)}, {own[0].document['n']} items:</p>{figures_table(own)}")
    return parts


def _results(document: Mapping[str, Any]) -> list[Result]:
    """The results of a file, in which what is no number is null."""
    return [
        Result(one["model"], one["task"], {**one, "metrics": _numbers(one["metrics"])}, [], Answers())
        for one in document["results"]
    ]


def _numbers(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {key: math.nan if v is None else v for key, v in told.items()} for name, told in metrics.items()}
