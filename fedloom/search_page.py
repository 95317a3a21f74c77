"""The report on a search: its history, what its keys are worth, and a picture for each of them."""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

from core_training.foundation.durable import commit_file
from core_training.foundation.strict_json import strict_json
from experiments.search.definition import Search
from experiments.search.outcome import SearchOutcome, TrialOutcome
from experiments.search.space import SearchedKey
from fedloom.page import image, page, table
from fedloom.pictures import COLOURS, new_figure

_PRUNED = "#bbbbbb"
_COLUMNS = 2


def write_page(search: Search, outcome: SearchOutcome, target: Path) -> None:
    """Write the page. Raises RunError when the disk refuses."""
    title = f"Search {Path(search.source).stem}"
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(_words(search, outcome))}</p>"]
    if any(trial.values or trial.slices for trial in outcome.trials):
        parts.append(image(_history(outcome), "The objective, trial by trial"))
        parts.append("<h2>Keys</h2>")
        parts.append(image(_slices(search, outcome), "The objective over each key's values"))
    if outcome.importances:
        rows = [[key, f"{100 * share:.0f} %"] for key, share in outcome.importances.items()]
        parts.append("<h2>What the objective depends on</h2>" + table(["key", "share"], rows))
    if len(outcome.objectives) > 1:
        parts.append("<h2>Trials that no other beats in all objectives</h2>")
        parts.append(image(_front(outcome), "The first two objectives, with the best trials marked"))
    if outcome.confirmed:
        rows = [[str(one.trial), f"{one.value:.6g}", f"{one.confirmed:.6g}"] for one in outcome.confirmed]
        topology = search.confirm.topology if search.confirm else ""
        parts.append("<h2>Confirmed</h2>" + table(["trial", "in the search", topology], rows))
    parts.append("<h2>Trials</h2>" + _table(search, outcome))
    commit_file(target, page(title, parts).encode())


def _words(search: Search, outcome: SearchOutcome) -> str:
    document = outcome.document()
    best = document["best"]
    found = "no trial ended" if best is None else f"best: {best['value']} with {strict_json(best['keys'])}"
    ways = ", ".join(f"{one.figure} ({one.direction})" for one in search.objectives)
    return (
        f"{document['trials']} trials, {document['pruned']} pruned, {document['failed']} failed; {ways}, by "
        f"{search.sampler.name}, pruned by {search.pruner.name}; {found}"
    )


def _value(trial: TrialOutcome) -> float | None:
    """The first objective, or where a pruned trial stood when it was ended."""
    if trial.values:
        return trial.values[0]
    return trial.slices[max(trial.slices)] if trial.slices else None


def _history(outcome: SearchOutcome) -> Any:
    figure = new_figure(7.2, 3.8)
    axes = figure.subplots()
    _scatter(axes, outcome, lambda trial: trial.number)
    best, line = None, []
    for trial in outcome.trials:
        if trial.values and (best is None or _is_better(outcome, trial.values[0], best)):
            best = trial.values[0]
        if best is not None:
            line.append((trial.number, best))
    axes.plot(
        [at for at, _ in line], [value for _, value in line], color=COLOURS[0], linewidth=1.8, label="best so far"
    )
    axes.set_xlabel("trial")
    axes.set_title(outcome.objectives[0], loc="left", fontsize=11)
    axes.legend(frameon=False)
    return figure


def _is_better(outcome: SearchOutcome, value: float, than: float) -> bool:
    return value < than if outcome.directions[0] == "minimize" else value > than


def _scatter(axes: Any, outcome: SearchOutcome, place: Any) -> None:
    for state, colour in (("pruned", _PRUNED), ("complete", COLOURS[1])):
        points = [
            (place(trial), _value(trial))
            for trial in outcome.trials
            if trial.state == state and _value(trial) is not None and place(trial) is not None
        ]
        axes.scatter([x for x, _ in points], [y for _, y in points], color=colour, s=24, label=state, zorder=3)


def _slices(search: Search, outcome: SearchOutcome) -> Any:
    rows = math.ceil(len(search.keys) / _COLUMNS)
    figure = new_figure(_COLUMNS * 4.4, rows * 3.2)
    grid = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for axes, key in zip(grid, search.keys, strict=False):
        _scatter(axes, outcome, lambda trial, key=key: _place(key, trial.keys.get(key.name)))
        axes.set_title(key.name, loc="left", fontsize=11)
        if key.kind == "categorical":
            axes.set_xticks(range(len(key.labels)), key.labels)
            axes.set_xlim(-0.5, len(key.labels) - 0.5)
        elif key.log:
            axes.set_xscale("log")
        axes.set_ylabel(outcome.objectives[0])
    for axes in grid[len(search.keys) :]:
        axes.remove()
    return figure


def _place(key: SearchedKey, value: Any) -> float | None:
    if value is None and None not in key.choices:
        return None
    return float(key.choices.index(value)) if key.kind == "categorical" else float(value)


def _front(outcome: SearchOutcome) -> Any:
    figure = new_figure(5.6, 4.0)
    axes = figure.subplots()
    for trial in outcome.trials:
        if trial.values:
            best = trial.number in outcome.best
            axes.scatter(*trial.values[:2], color=COLOURS[0] if best else _PRUNED, s=40 if best else 24, zorder=3)
            axes.annotate(str(trial.number), trial.values[:2], fontsize=8)
    axes.set_xlabel(outcome.objectives[0])
    axes.set_ylabel(outcome.objectives[1])
    return figure


def _table(search: Search, outcome: SearchOutcome) -> str:
    columns = ["trial", "state", *outcome.objectives, *(key.name for key in search.keys), "slices", "seconds", "why"]
    return table(columns, [_row(search, outcome, trial) for trial in outcome.trials])


def _row(search: Search, outcome: SearchOutcome, trial: TrialOutcome) -> list[str]:
    values = trial.values or [math.nan] * len(outcome.objectives)
    return [
        f"{trial.number}{' (best)' if trial.number in outcome.best else ''}",
        trial.state,
        *("–" if math.isnan(value) else f"{value:.6g}" for value in values),
        *(_shown(trial.keys.get(key.name, "–")) for key in search.keys),
        str(len(trial.slices)),
        f"{trial.seconds.get('trial', 0.0):.1f}",
        trial.why,
    ]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else strict_json(value)
