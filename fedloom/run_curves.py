"""A run as a report shows it: its curves, its sites' curves, and what is known of it, ended or not.

Reads run folders of every topology, a site's and a gossip node's among them. Draws nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core_training.foundation.errors import InputError
from core_training.recipe.schema import Recipe
from core_training.runs.curve import CURVE_FILE, Row
from core_training.runs.events import NodeRound, SliceTrained
from core_training.runs.run_folder import RunFolder

Line = tuple[tuple[int, ...], tuple[float, ...]]
"""Optimizer steps at each site so far, and the values there."""

_NOT_DRAWN = ("step", "round", "weight", "tokens", "sites")


@dataclass(frozen=True)
class RunCurves:
    """A run: its lines by the figure's name, and those of its sites where it has none of its own."""

    label: str
    recipe: Recipe
    state: str
    summary: Mapping[str, Any]
    lines: Mapping[str, Line]
    of_sites: Mapping[str, Sequence[Line]]

    def of(self, name: str) -> Sequence[Line]:
        """The lines of a figure."""
        return [self.lines[name]] if name in self.lines else self.of_sites.get(name, ())

    @property
    def steps(self) -> int:
        """Optimizer steps so far, at each site."""
        every = [*self.lines.values(), *(line for lines in self.of_sites.values() for line in lines)]
        return max((line[0][-1] for line in every), default=0)


def read_runs(paths: Sequence[Path]) -> list[RunCurves]:
    """The runs in these folders. Raises InputError for one that holds no run."""
    short = [path.resolve().name for path in paths]
    labels = short if len(set(short)) == len(short) else list(map(str, paths))
    return [_read(path, label) for path, label in zip(paths, labels, strict=True)]


def _read(path: Path, label: str) -> RunCurves:
    if not path.is_dir():
        raise InputError(f"{path}: no such run folder")
    if not (path / "recipe.yaml").is_file():
        raise InputError(f"{path}: not a run folder (it has no recipe.yaml)")
    folder = RunFolder(path)
    recipe, status = folder.recipe, folder.status()
    local_steps = recipe.topology.local_steps or 1
    sites = [
        _lines(RunFolder(curve.parent).curve(), local_steps) for curve in sorted(path.glob(f"sites/*/*/{CURVE_FILE}"))
    ]
    return RunCurves(
        label=label,
        recipe=recipe,
        state=status.note if status.state == "failed" and status.note else status.state,
        summary=folder.summary() or {},
        lines=_of_rounds(folder, recipe) | _lines(folder.curve(), local_steps),
        of_sites={name: [own[name] for own in sites if name in own] for name in _names(sites)},
    )


def _lines(rows: Iterable[Row], local_steps: int) -> dict[str, Line]:
    """The figures of a curve, by name."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        at = row["step"] if "step" in row else row["round"] * local_steps
        for name, value in row.items():
            if name not in _NOT_DRAWN and value is not None:
                points.setdefault(name, []).append((at, value))
    return {name: _line(found) for name, found in points.items()}


def _of_rounds(folder: RunFolder, recipe: Recipe) -> dict[str, Line]:
    """The losses that events alone tell: a node's, a site's on the states that came in, those of earlier versions."""
    local_steps = recipe.topology.local_steps or 1
    if recipe.topology.kind == "central":
        held_out = [(point.at, point.eval_loss) for point in folder.status().curve.values()]
        return _named(eval_loss=held_out)
    rounds = {point.at: (point.loss, point.eval_loss) for point in folder.status().curve.values()}
    told: list[SliceTrained | NodeRound] = [*folder.events(SliceTrained), *folder.events(NodeRound)]
    rounds |= {event.round: (event.loss, event.eval_loss) for event in told}
    return _named(
        loss=[(number * local_steps, loss) for number, (loss, _) in sorted(rounds.items())],
        eval_loss=[((number - 1) * local_steps, loss) for number, (_, loss) in sorted(rounds.items())],
    )


def _named(**points: Sequence[tuple[int, float | None]]) -> dict[str, Line]:
    known = {name: [(at, value) for at, value in found if value is not None] for name, found in points.items()}
    return {name: _line(found) for name, found in known.items() if found}


def _line(points: Sequence[tuple[int, float]]) -> Line:
    return tuple(at for at, _ in points), tuple(value for _, value in points)


def _names(of_sites: Iterable[Mapping[str, Line]]) -> list[str]:
    return list(dict.fromkeys(name for own in of_sites for name in own))
