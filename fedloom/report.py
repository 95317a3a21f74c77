"""A report on any set of runs: one HTML file with everything in it, pictures included, that opens anywhere.

Reads run folders, of every topology. Knows nothing of what was trained; the caller brings title and words.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core_training.foundation.durable import commit_file
from core_training.foundation.errors import InputError
from core_training.recipe.reading import load_recipe
from core_training.recipe.schema import Recipe
from core_training.runs.events import NodeRound
from core_training.runs.run_folder import RunFolder
from fedloom.page import image, page, table
from fedloom.pictures import COLOURS, new_figure, rendered


@dataclass(frozen=True)
class Curve:
    """Loss on held-out records over the training examples that all sites together had seen by then."""

    examples: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Entry:
    """A line of the report: one run, or several that belong together. What is not known is None or empty.

    `eval_loss` is per token; `accuracy` the share of answers that greedy decoding gives word for word; `by_group` the
    accuracy on parts of the held-out records; `traffic` bytes sent up and down; `protection` the seconds, of all
    `seconds`, that secure aggregation took.
    """

    label: str
    curve: Curve
    eval_loss: float | None
    accuracy: float | None
    tokens: int | None
    traffic: int | None
    seconds: float | None
    by_group: Mapping[str, float] = field(default_factory=dict)
    protection: float | None = None


@dataclass(frozen=True)
class Report:
    """The page's content. `bars` are the series of the accuracy picture; empty: those of `entries`."""

    title: str
    paragraphs: Sequence[str]
    entries: Sequence[Entry]
    bars: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    commands: Sequence[str] = ()

    @property
    def series(self) -> Mapping[str, Mapping[str, float]]:
        """Accuracy by group, for each bar of a group."""
        return self.bars or {entry.label: entry.by_group for entry in self.entries if entry.by_group}

    @property
    def colours(self) -> Mapping[str, str]:
        """One colour for each label, the same in both pictures."""
        labels = dict.fromkeys([*(entry.label for entry in self.entries if entry.curve.losses), *self.series])
        return {label: COLOURS[index % len(COLOURS)] for index, label in enumerate(labels)}


def read_entry(label: str, *runs: Path) -> Entry:
    """The figures of one run, or of several as one line: losses and accuracies averaged, everything else added up.

    Raises InputError for a folder without a completed run.
    """
    summaries = [_summary(run) for run in runs]
    protection = [s["seconds"]["secure_aggregation"] for s in summaries if "secure_aggregation" in s["seconds"]]
    traffic = [s["bytes_up"] + s["bytes_down"] for s in summaries if s["bytes_up"] is not None]
    return Entry(
        label=label,
        curve=_average([read_curve(run) for run in runs]),
        eval_loss=_mean([s["eval_loss"] for s in summaries]),
        accuracy=_mean([s["metrics"].get("exact_match") for s in summaries]),
        tokens=sum(s["tokens_trained"] or 0 for s in summaries),
        traffic=sum(traffic) if traffic else None,
        seconds=sum(s["seconds"].get("total") or 0.0 for s in summaries),
        protection=sum(protection) if protection else None,
    )


def read_curve(run: Path) -> Curve:
    """The loss on held-out records as the run went on, from its events."""
    recipe = load_recipe(run / "recipe.yaml")
    training = recipe.training
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * recipe.deepspeed.processes
    points = sorted((steps * per_step, loss) for steps, loss in _evaluations(run, recipe))
    return Curve(tuple(float(examples) for examples, _ in points), tuple(loss for _, loss in points))


def write_report(report: Report, target: Path) -> None:
    """Write the page. Raises RunError when the disk refuses."""
    commit_file(target, _page(report).encode())


def write_picture(report: Report, target: Path) -> None:
    """Both pictures of the page side by side, as a PNG."""
    figure = new_figure(11.0, 4.2)
    left, right = figure.subplots(1, 2)
    draw_curves(left, report)
    draw_bars(right, report)
    commit_file(target, rendered(figure, "png"))


def draw_curves(axes: Any, report: Report) -> None:
    """The entries' loss curves, on matplotlib axes."""
    drawn: list[Curve] = []
    for entry in report.entries:
        if entry.curve.losses:
            thousands = [examples / 1000 for examples in entry.curve.examples]
            # Curves that lie on each other stay visible: the later one is dashed.
            dashes = (0, (4, 4)) if any(_close(entry.curve, other) for other in drawn) else "-"
            axes.plot(
                thousands,
                entry.curve.losses,
                linestyle=dashes,
                color=report.colours[entry.label],
                label=entry.label,
                linewidth=2,
            )
            drawn.append(entry.curve)
    axes.set_xlabel("training examples, all sites together (thousands)")
    axes.set_title("Loss on the held-out records", loc="left", fontsize=11)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def draw_bars(axes: Any, report: Report) -> None:
    """Accuracy in groups of bars, on matplotlib axes."""
    series = report.series
    groups = list(dict.fromkeys(group for values in series.values() for group in values))
    width = 0.84 / max(1, len(series))
    for index, (label, values) in enumerate(series.items()):
        places = [place - 0.42 + (index + 0.5) * width for place in range(len(groups))]
        heights = [100 * values.get(group, 0.0) for group in groups]
        axes.bar(places, heights, width * 0.9, color=report.colours[label], label=label)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, 100)
    axes.set_yticks(range(0, 101, 20), [f"{percent} %" for percent in range(0, 101, 20)])
    axes.set_title("Held-out answers right word for word", loc="left", fontsize=11)
    axes.legend(frameon=False, ncols=min(3, max(1, len(series))), loc="upper center", bbox_to_anchor=(0.5, -0.08))


def _evaluations(run: Path, recipe: Recipe) -> Iterator[tuple[float, float]]:
    """(optimizer steps at all sites together, held-out loss) of each evaluation."""
    folder = RunFolder(run)
    local_steps = recipe.topology.local_steps or 1  # where each site goes at a pace of its own, rounds
    if recipe.topology.kind == "central":
        points = folder.status().curve.values()
        yield from ((point.at, point.eval_loss) for point in points if point.eval_loss is not None)
        return
    # A federation's rounds and a gossip node's report the loss of the state they began with.
    if recipe.topology.kind == "federated":
        rounds = [(point.at, point.eval_loss, point.sites) for point in folder.status().curve.values()]
    else:
        by_round: dict[int, list[float]] = {}
        for node in [folder, *(RunFolder(site) for site in sorted((run / "sites").glob("*")))]:
            for event in node.events(NodeRound):
                if event.eval_loss is not None:
                    by_round.setdefault(event.round, []).append(event.eval_loss)
        rounds = [(number, _mean(losses), len(losses)) for number, losses in sorted(by_round.items())]
    sites = 1
    for number, loss, sites in rounds:
        if loss is not None:
            yield (number - 1) * local_steps * sites, loss
    summary = _summary(run)
    if summary["eval_loss"] is not None:
        yield summary["rounds"] * local_steps * sites, summary["eval_loss"]


def _summary(run: Path) -> dict[str, Any]:
    folder = RunFolder(run)
    summary = folder.summary()
    if summary is None or not folder.has_completed:
        raise InputError(f"{run}: there is no completed run here (no summary.json)")
    return summary


def _average(curves: Sequence[Curve]) -> Curve:
    """Several runs as one, where they were evaluated at the same points: examples added, losses averaged."""
    length = min(len(curve.losses) for curve in curves)
    return Curve(
        tuple(sum(curve.examples[i] for curve in curves) for i in range(length)),
        tuple(sum(curve.losses[i] for curve in curves) / len(curves) for i in range(length)),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _close(one: Curve, other: Curve) -> bool:
    """Whether two curves look the same in a picture."""
    return len(one.losses) == len(other.losses) and all(
        abs(a - b) < 0.005 for a, b in zip(one.losses, other.losses, strict=True)
    )


def _picture(draw: Callable[[Any, Report], None], report: Report, description: str) -> str:
    figure = new_figure(7.2, 4.4)
    draw(figure.subplots(), report)
    return image(figure, description)


def _page(report: Report) -> str:
    parts = [f"<h1>{html.escape(report.title)}</h1>"]
    parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in report.paragraphs]
    parts.append(_table(report.entries))
    parts.append(_picture(draw_curves, report, "Loss on held-out records, over training examples"))
    if report.series:
        parts.append(_picture(draw_bars, report, "Accuracy, by part of the held-out records"))
    if report.commands:
        parts.append("<h2>Commands</h2><pre>" + "\n".join(map(html.escape, report.commands)) + "</pre>")
    return page(report.title, parts)


def _table(entries: Sequence[Entry]) -> str:
    groups = list(dict.fromkeys(group for entry in entries for group in entry.by_group))
    masked = ["of them for masks"] if any(entry.protection is not None for entry in entries) else []
    columns = ["", "loss", "accuracy", *groups, "tokens trained", "traffic", "seconds", *masked]
    rows = [
        [
            entry.label,
            "–" if entry.eval_loss is None else f"{entry.eval_loss:.3f}",
            _percent(entry.accuracy),
            *(_percent(entry.by_group.get(group)) for group in groups),
            "–" if entry.tokens is None else f"{entry.tokens:,}",
            "–" if entry.traffic is None else f"{entry.traffic / 1e6:.1f} MB",
            "–" if entry.seconds is None else f"{entry.seconds:.0f}",
            *("–" if entry.protection is None else f"{entry.protection:.1f}" for _ in masked),
        ]
        for entry in entries
    ]
    return table(columns, rows)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
