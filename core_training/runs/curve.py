"""The curve of a run: one row for each step, or each round, at which something was measured; `curve.jsonl`.

`events.jsonl` keeps what happened, also what a kill and `--resume` made happen twice. The curve has each step once, in
order, from the run as it stands: when a run goes back to a checkpoint, the rows after it go.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from core_training.foundation.bounded_reading import parse_value, read_lines
from core_training.foundation.errors import InputError, RunError
from core_training.foundation.strict_json import strict_json
from core_training.runs import events

CURVE_FILE = "curve.jsonl"

Axis = Literal["step", "round"]
Row = dict[str, Any]
"""A line of `curve.jsonl`: `step` or `round`, and the figures by name."""


@dataclass(frozen=True)
class Measured:
    """Figures of one step or round; those of the same one, measured earlier, stay beside them."""

    axis: Axis
    at: int
    figures: dict[str, Any]

    @property
    def row(self) -> Row:
        return {self.axis: self.at, **self.figures}


@dataclass(frozen=True)
class GoneBack:
    """The run stands at the end of this step or round: what was measured after it is to be measured anew."""

    at: int


def measured(event: events.Event) -> list[Measured | GoneBack]:
    """What an event means for the curve, in order."""
    match event:
        case events.StepsLogged():
            return [Measured("step", event.step, _figures_of(event))]
        case events.Evaluated():
            return [Measured("step", event.step, {"eval_loss": event.loss})]
        case events.Round():
            before = [Measured("round", event.round - 1, {"eval_loss": event.eval_loss})]
            after = Measured("round", event.round, {"loss": event.loss, "sites": len(event.sites)})
            return [*(before if event.eval_loss is not None else []), after]
        case events.LastStateEvaluated():
            return [Measured("round", event.round, {"eval_loss": event.eval_loss})]
        case events.CentralStarted() | events.FederatedStarted():
            return [GoneBack(-1)]
        case events.ResumedAtStep():
            return [GoneBack(event.step)]
        case events.ResumedAtRound() | events.Rewound():
            return [GoneBack(event.round)]
    return []


def _figures_of(event: events.StepsLogged) -> dict[str, Any]:
    """The figures of a point; the round of a central run's is none of them."""
    left_out = {"event", "step"} | ({"round"} if event.round is None else set())
    return {name: value for name, value in event.document().items() if name not in left_out}


class CurveFile:
    """`curve.jsonl`, kept in step with the events of a run. One process writes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last: tuple[int, Row] | None = None
        """The byte at which the last row begins, and the row. None: not known yet, or there is none."""
        self._is_known = False

    def take(self, event: events.Event) -> None:
        """Write what an event adds to the curve. Raises RunError when the disk refuses."""
        try:
            for change in measured(event):
                if isinstance(change, GoneBack):
                    self._cut(change.at)
                else:
                    self._put(change)
        except OSError as error:
            raise RunError(f"{self._path} cannot be written: {error}") from error

    def rows(self) -> Iterator[Row]:
        """The rows so far. Raises InputError where the file is a pipe or a device."""
        try:
            yield from (row for _, _, row in self._read())
        except OSError as error:
            raise InputError(f"{self._path}: cannot be read: {error.strerror or error}") from None

    def _put(self, new: Measured) -> None:
        if not self._is_known:
            self._cut(_NO_END)
        if self._last is not None and _at(self._last[1]) > new.at:  # the steps are taken again
            self._cut(new.at)
        row, start = new.row, None
        if self._last is not None and _at(self._last[1]) == new.at:
            start, earlier = self._last
            row = {**earlier, **row}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._is_known = False  # should the disk refuse: what is left of the line is cut off before the next one
        with self._path.open("r+b" if self._path.exists() else "wb") as file:
            self._last = (file.seek(0, os.SEEK_END) if start is None else file.seek(start), row)
            file.write((strict_json(row) + "\n").encode())  # over the earlier row: it only grows
            file.truncate()
        self._is_known = True

    def _cut(self, after: int) -> None:
        """Remove the rows after step or round `after`, and a line that a kill cut short."""
        self._last, end = None, 0
        for start, stop, row in self._read():
            if _at(row) > after:
                break
            self._last, end = (start, row), stop
        self._is_known = True
        if self._path.exists():
            os.truncate(self._path, end)

    def _read(self) -> Iterator[tuple[int, int, Row]]:
        """The whole rows, each with the bytes between which it lies; a line that is none ends them."""
        if not self._path.exists():
            return
        start = 0
        for line in read_lines(self._path):
            if (row := _row_of(line)) is None:
                return
            yield start, start + len(line), row
            start += len(line)


_NO_END = 2**63


def _row_of(line: bytes) -> Row | None:
    """The row of a line; None for one that a kill or a full disk cut short, or that is something else."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = parse_value(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step", row.get("round")), int) else None


def _at(row: Row) -> int:
    """The step or round of a row."""
    number: int = row["step"] if "step" in row else row["round"]
    return number
