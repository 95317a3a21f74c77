"""The report on an evaluation: figures with intervals, pictures, differences, worst and best examples."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_training.foundation.durable import commit_file
from evaluation.figures.examples import Example, worst_and_best
from evaluation.figures.gates import Verdict
from evaluation.figures.results import Result
from fedloom.page import image, page, table
from fedloom.pictures import COLOURS, new_figure

if TYPE_CHECKING:
    from evaluation.running import Evaluation

REPORT = "report.html"
_EXAMPLES = 5
_LONGEST = 1500
"""Letters of a text that an example shows."""
_SHARES = ("accuracy", "macro_f1", "exact_match", "token_f1", "rouge_l", "rubric")
"""Figures between 0 and 1 that are drawn, where they were measured."""


def write_report(found: Evaluation, verdicts: Sequence[Verdict]) -> Path:
    """Write the report beside the answers. Raises RunError when the disk refuses."""
    target = found.folder / REPORT
    commit_file(target, _page(found, verdicts).encode())
    return target


def names_of(results: Iterable[Result]) -> dict[str, str]:
    """The models' names for people: their folders', with as many folders before as tell those of one name apart."""
    models = list(dict.fromkeys(result.model for result in results))
    named = {}
    for model in models:
        alike = [other for other in models if Path(other).name == Path(model).name]
        depths = range(1, len(Path(model).parts) + 1)
        apart = (d for d in depths if sum(_last(other, d) == _last(model, d) for other in alike) == 1)
        named[model] = _last(model, next(apart, len(depths))) or model
    return named


def _last(model: str, count: int) -> str:
    return "/".join(Path(model).parts[-count:])


def _page(found: Evaluation, verdicts: Sequence[Verdict]) -> str:
    tasks = list(dict.fromkeys(result.task for result in found.results))
    names = names_of(found.results)
    title = f"{', '.join(names.values())} on {', '.join(tasks)}"
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if verdicts:
        rows = [
            [one.gate.key, names[one.model], one.task, "passed" if one.passed else "failed", one.words]
            for one in verdicts
        ]
        parts.append("<h2>Gates</h2>" + table(["gate", "model", "task", "", "says"], rows))
    for task in tasks:
        parts += _of_task([result for result in found.results if result.task == task])
    if found.comparisons:
        parts.append("<h2>Differences</h2>" + _comparisons(found))
    answers = html.escape(str(found.folder / "answers.jsonl"))
    parts.append(
        "<p>Intervals: 95 %, by bootstrap over items. Accuracy is by log-likelihood; of choices that tie the first is "
        f"taken. Every answer: <code>{answers}</code>.</p>"
    )
    return page(title, parts)


def _of_task(results: Sequence[Result]) -> list[str]:
    first, names = results[0], names_of(results)
    parts = [f"<h2>{html.escape(first.task)}</h2>", f"<p>{first.document['n']} items.</p>", figures_table(results)]
    parts += [
        f"<p>{html.escape(names[result.model])}: {html.escape(note)}</p>"
        for result in results
        for note in (*result.document["notes"], *(f"{n} {what}" for what, n in result.document["left_out"].items()))
    ]
    if any(name in result.document["metrics"] for result in results for name in _SHARES):
        parts.append(image(_bars(results), "Figures with their intervals"))
    if "confusion" in first.document:
        parts.append(image(_calibration(results), "Accuracy over confidence"))
        parts += [_confusion(result, names[result.model]) for result in results]
    for column in first.document["groups"]:
        parts += [f"<h3>By {html.escape(column)}</h3>", _groups(results, column)]
    if (ranked := worst_and_best(results, _EXAMPLES)) is not None:
        name, worst, best = ranked
        for title, examples in (("Worst", worst), ("Best", best)):
            if examples:
                parts.append(f"<h3>{title} by {html.escape(name)}</h3>" + _examples(results, examples))
    return parts


def figures_table(results: Sequence[Result]) -> str:
    """A row for each figure, a column for each model."""
    return table(["", *names_of(results).values()], figure_rows(results))


def figure_rows(results: Sequence[Result]) -> list[list[str]]:
    """Each figure's name and its value with interval for each result; baselines below, where there are any."""
    names = dict.fromkeys(name for result in results for name in result.document["metrics"])
    rows = [[name, *(shown(result.document["metrics"].get(name)) for result in results)] for name in names]
    for what in ("majority", "random"):
        if any("baselines" in result.document for result in results):
            told = [result.document.get("baselines", {}).get(what) for result in results]
            rows.append([f"({what} answer)", *(_baseline(one) for one in told)])
    return rows


def _baseline(told: dict[str, Any] | None) -> str:
    if told is None:
        return "–"
    return f"{told['value']:.3f}" + (f" ({told['answer']})" if "answer" in told else "")


def shown(told: dict[str, Any] | None) -> str:
    """A figure with its interval."""
    if told is None or math.isnan(told["value"]):
        return "–"
    if math.isnan(told["low"]):
        return _number(told["value"])
    return f"{_number(told['value'])} [{_number(told['low'])}, {_number(told['high'])}]"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def _bars(results: Sequence[Result]) -> Any:
    models = names_of(results)
    names = [name for name in _SHARES if any(name in result.document["metrics"] for result in results)]
    figure = new_figure(max(5.0, 1.6 * len(names) + 2), 3.4)
    axes = figure.subplots()
    width = 0.8 / len(results)
    for index, result in enumerate(results):
        told = [result.document["metrics"].get(name) for name in names]
        places = [place - 0.4 + (index + 0.5) * width for place, one in enumerate(told) if one]
        values = [one["value"] for one in told if one]
        ends = [[max(0.0, one["value"] - _end(one, "low")) for one in told if one]]
        ends.append([max(0.0, _end(one, "high") - one["value"]) for one in told if one])
        colour = COLOURS[index % len(COLOURS)]
        axes.bar(places, values, width * 0.9, color=colour, label=models[result.model], yerr=ends, capsize=3)
    for what, style in (("majority", "--"), ("random", ":")):
        if "accuracy" in names and "baselines" in results[0].document:
            axes.hlines(results[0].document["baselines"][what]["value"], -0.4, 0.4, "#555555", style, label=what)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _end(told: dict[str, Any], name: str) -> float:
    return float(told["value"] if math.isnan(told[name]) else told[name])


def _calibration(results: Sequence[Result]) -> Any:
    figure = new_figure(4.6, 3.4)
    axes = figure.subplots()
    names = names_of(results)
    axes.plot([0, 1], [0, 1], color="#aaaaaa", linewidth=0.8)
    for index, result in enumerate(results):
        bins = result.document.get("calibration", [])
        axes.plot(
            [one["confidence"] for one in bins],
            [one["accuracy"] for one in bins],
            marker="o",
            color=COLOURS[index % len(COLOURS)],
            label=names[result.model],
        )
    axes.set_xlabel("confidence")
    axes.set_title("Share right", loc="left", fontsize=11)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _confusion(result: Result, name: str) -> str:
    told = result.document["confusion"]
    rows = [
        [label, *("·" if cell is None else str(cell) for cell in row)]
        for label, row in zip(told["labels"], told["counts"], strict=True)
    ]
    head = f"<h3>{html.escape(name)}: right (rows) and chosen (columns)</h3>"
    return head + table(["", *told["labels"]], rows)


def _groups(results: Sequence[Result], column: str) -> str:
    groups = results[0].document["groups"][column]
    names = list(dict.fromkeys(name for group in groups.values() for name in group["metrics"]))[:4]
    models = names_of(results)
    columns = ["", "n", *(f"{models[r.model]}: {name}" for r in results for name in names)]
    rows = []
    for value, group in groups.items():
        cells = [r.document["groups"][column][value]["metrics"].get(name) for r in results for name in names]
        rows.append([value, "few" if group["n"] is None else str(group["n"]), *(shown(cell) for cell in cells)])
    return table(columns, rows)


def _comparisons(found: Evaluation) -> str:
    names = names_of(found.results)
    rows = [
        [
            f"{names[one.model]} − {names[one.against]}",
            one.task,
            one.metric,
            shown({"value": one.difference.value, "low": one.difference.low, "high": one.difference.high}),
            "–" if math.isnan(one.difference.p) else f"{one.difference.p:.3g}",
            "–" if math.isnan(one.adjusted) else f"{one.adjusted:.3g}",
            one.difference.method,
        ]
        for one in found.comparisons
    ]
    return table(["", "task", "figure", "difference", "p", "p (Holm)", "by"], rows)


_CELL = 'style="white-space: pre-wrap; text-align: left; vertical-align: top; min-width: 12rem; max-width: 28rem"'


def _examples(results: Sequence[Result], examples: Sequence[Example]) -> str:
    columns = ["value", "prompt", "expected", *names_of(results).values()]
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = []
    for one in examples:
        texts = [one.item.question, one.item.expected or "–", *one.answers]
        cells = "".join(f"<td {_CELL}>{html.escape(_short(text))}</td>" for text in texts)
        body.append(f"<tr><td>{_number(one.value)}</td>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
