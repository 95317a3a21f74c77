"""The report on runs: a picture of their curves, and tables of what is known of them and of where they differ."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core_training.foundation.durable import commit_file
from core_training.foundation.errors import InputError
from fedloom.page import image, page, table
from fedloom.pictures import COLOURS, new_figure, rendered
from fedloom.run_curves import RunCurves

_TITLES = {
    "loss": "Training loss",
    "eval_loss": "Loss on the held-out records",
    "learning_rate": "Learning rate",
    "grad_norm": "Norm of the gradient before clipping",
    "tokens_per_second": "Tokens per second",
}
"""The pictures that every run has, in order; those of the stage's own figures follow."""

_COLUMNS = 2
_INCHES = (5.5, 3.2)
"""Width and height of one picture."""

_STYLES = ("-", "--", "-.", ":")
"""One after another, so that runs whose lines lie on each other are seen."""

_MARKED = 30
"""Points up to which each is marked: a line through few of them says little."""

KINDS = ("html", "svg", "png")


def write_curves(runs: Sequence[RunCurves], target: Path) -> None:
    """Write the report in the kind that the file's name ends with.

    Raises InputError for another kind, and for a picture of nothing; RunError when the disk refuses.
    """
    kind = target.suffix.lower().removeprefix(".")
    if kind not in KINDS:
        raise InputError(f"--to: {target}: a report is a file that ends with .html, .svg or .png")
    if kind == "html":
        commit_file(target, _page(runs).encode())
    elif _names(runs):
        commit_file(target, rendered(_picture(runs), kind))
    else:
        raise InputError(f"{', '.join(run.label for run in runs)}: no figures yet to draw; .html shows what is known")


def _page(runs: Sequence[RunCurves]) -> str:
    title = ", ".join(run.label for run in runs)
    return page(title, [f"<h1>{html.escape(title)}</h1>", *parts_of(runs)])


def parts_of(runs: Sequence[RunCurves]) -> list[str]:
    """What a page says of runs, as HTML: a table of them, their curves, and where their recipes differ."""
    parts = [table(*_account(runs))]
    if _names(runs):
        parts.append(image(_picture(runs), "Curves over optimizer steps at each site"))
    else:
        parts.append("<p>There are no figures yet to draw.</p>")
    if differing := _differences(runs):
        parts.append("<h2>Where the recipes differ</h2>" + table(["", *(run.label for run in runs)], differing))
    return parts


def _picture(runs: Sequence[RunCurves]) -> Any:
    names = _names(runs)
    rows = math.ceil(len(names) / _COLUMNS)
    figure = new_figure(_COLUMNS * _INCHES[0], rows * _INCHES[1])
    grid = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for axes, name in zip(grid, names, strict=False):
        for index, run in enumerate(runs):
            _draw(axes, name, run, COLOURS[index % len(COLOURS)], _STYLES[index % len(_STYLES)])
        axes.set_title(_TITLES.get(name) or _as_it_is(name.replace("_", " ")), loc="left", fontsize=11)
        axes.set_xlabel("optimizer steps at each site")
        axes.legend(frameon=False)
    for axes in grid[len(names) :]:
        axes.remove()
    return figure


def _draw(axes: Any, name: str, run: RunCurves, colour: str, style: str) -> None:
    """A run's line of a figure; or its sites', thinner, under one label."""
    lines = run.of(name)
    for number, (steps, values) in enumerate(lines):
        axes.plot(
            steps,
            values,
            color=colour,
            linestyle=style,
            label=None if number else _as_it_is(run.label),
            linewidth=1.8 if len(lines) == 1 else 0.9,
            marker="o" if len(steps) <= _MARKED else None,
            markersize=3,
        )


def _as_it_is(text: str) -> str:
    """A text that matplotlib shows as it is: it takes dollars for formulas, and hides what begins with a line."""
    shown = text.replace("$", r"\$")
    return f"\u200b{shown}" if shown.startswith("_") else shown


def _names(runs: Sequence[RunCurves]) -> list[str]:
    """The figures to draw, in order."""
    found = dict.fromkeys(name for run in runs for name in (*run.lines, *run.of_sites))
    return [*(name for name in _TITLES if name in found), *sorted(name for name in found if name not in _TITLES)]


def _account(runs: Sequence[RunCurves]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of runs."""
    columns = [
        *("", "what", "state", "steps", "training loss", "held-out loss before", "after", "lowest"),
        *("tokens trained", "seconds"),
    ]
    return columns, [_row(run) for run in runs]


def _row(run: RunCurves) -> list[str]:
    training = run.lines["loss"][1] if "loss" in run.lines else ()
    held_out = run.lines["eval_loss"][1] if "eval_loss" in run.lines else ()
    summary = run.summary
    return [
        run.label,
        f"{run.recipe.stage} · {run.recipe.tuning.mode} · {run.recipe.topology.kind}",
        summary.get("status", run.state),
        f"{run.steps:,}",
        _loss(training[-1] if training else None),
        _loss(held_out[0] if held_out else None),
        _loss(summary.get("eval_loss", held_out[-1] if held_out else None)),
        _loss(min(held_out, default=None)),
        _whole(summary.get("tokens_trained")),
        _whole(summary.get("seconds", {}).get("total")),
    ]


def _differences(runs: Sequence[RunCurves]) -> list[list[str]]:
    """Key and each run's value, for every key in which their recipes differ, but for where they write to."""
    flat = [run.recipe.flat() for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one if key != "output")
    return [
        [key, *(str(one.get(key, "–")) for one in flat)] for key in keys if len({str(one.get(key)) for one in flat}) > 1
    ]


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"
