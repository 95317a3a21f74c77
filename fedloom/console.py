"""The output for people: a progress bar on a terminal, one line a round elsewhere, a table at the end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from core_training.foundation.foreign_text import printable
from core_training.foundation.strict_json import strict_json
from fedloom.streams import lead_nowhere

_WHOLE = 10_000
"""Columns where nobody looks at a terminal: rich would cut tables to 80."""


def console(*, on_error: bool = False) -> Console:
    """A console on standard output, or on standard error.

    Texts are printed as they are: names and paths may hold square brackets, which rich would take for its markup, and
    colons, which it would take for emoji.
    """
    made = (_Lasting if on_error else Console)(stderr=on_error, highlight=False, markup=False, emoji=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _WHOLE
    return made


class _Lasting(Console):
    """A console on standard error, which nobody need read: a run goes on where its reader has gone or its disk is full.

    On standard output rich's own answer holds: who is told nothing of a result wants none.
    """

    def _write_buffer(self) -> None:
        try:
            super()._write_buffer()
        except OSError:
            lead_nowhere(self.file.fileno())


stderr = console(on_error=True)

_SECONDS_BETWEEN_LINES = 10.0


class Ticker:
    """A report of a run's progress: `advance(done, total, note)`."""

    def __init__(self, label: str, unit: str, bar: Progress | None, *, quiet: bool) -> None:
        self._label = label
        self._unit = unit
        self._bar = bar
        self._quiet = quiet
        self._task = bar.add_task(label, total=None, note="") if bar is not None else None
        self._last_line = 0.0

    def advance(self, done: int, total: int, note: str = "") -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, note=note)
        elif not self._quiet and (note or done == total or time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES):
            self._last_line = time.monotonic()
            stderr.print(f"{self._label}: {self._unit} {done}/{total} {note}".rstrip(), soft_wrap=True)


@contextmanager
def ticking(label: str, unit: str, *, quiet: bool = False) -> Iterator[Ticker]:
    """A progress bar on standard error while the block runs; without a terminal, a line now and then."""
    if quiet or not stderr.is_terminal:
        yield Ticker(label, unit, None, quiet=quiet)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit + "s", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=stderr) as bar:
        yield Ticker(label, unit, bar, quiet=quiet)


@contextmanager
def results_only_on_stdout() -> Iterator[None]:
    """Send what libraries print in the block to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def warn(warnings: Sequence[str]) -> None:
    """Print what is allowed and yet likely not wanted: a line each."""
    for warning in warnings:
        stderr.print(printable(f"warning: {warning}"), soft_wrap=True)


def show_left_out(truncated: int | None, dropped: int | None) -> None:
    """Report the records cut or left out, where any were."""
    if truncated or dropped:
        stderr.print(
            f"of the records, {truncated} were cut at training.max_length and {dropped} left out "
            "(within it they have nothing to learn, or they are held out elsewhere)",
            soft_wrap=True,
        )


def show_summary(summary: Mapping[str, Any], folder: str, *, as_json: bool, quiet: bool) -> None:
    """Show a run's end: a table for people, or the summary as one JSON object."""
    if as_json:
        typer.echo(strict_json(summary))
        return
    if quiet:
        return
    table = Table(title=f"{summary['stage']} · {summary['tuning']} · {summary['topology']}", title_justify="left")
    for column in ("site", "train", "held out", "loss before", "loss after"):
        table.add_column(column, justify="left" if column == "site" else "right", overflow="fold")
    for name, site in summary["sites"].items():
        table.add_row(
            printable(name),
            _shown(site["train_examples"]),
            _shown(site["eval_examples"]),
            _shown(site["eval_loss_initial"]),
            _shown(site["eval_loss"]),
        )
    table.add_section()
    table.add_row("all", "", "", _shown(summary["eval_loss_initial"]), _shown(summary["eval_loss"]))
    stderr.print(table)
    if summary["topology"] != "central":  # there it was said before training
        show_left_out(summary.get("truncated"), summary.get("dropped"))
    rounds = f", {summary['rounds']} rounds, {summary.get('void_rounds') or 0} void" if summary.get("rounds") else ""
    seconds = summary["seconds"].get("total") or 0
    stderr.print(f"{summary['status']} in {seconds:.0f} s{rounds}: {folder}", soft_wrap=True)
    show_protection(summary)


def show_protection(summary: Mapping[str, Any]) -> None:
    """Report the time for masking and the values cut at the clip; nothing where nothing was."""
    seconds = summary["seconds"].get("secure_aggregation")
    if seconds is not None:
        stderr.print(f"secure aggregation: {seconds:.1f} s of it")
    if summary.get("saturated"):
        stderr.print(f"{summary['saturated']:,} values of all updates were cut at privacy.clip", soft_wrap=True)
    if account := summary.get("privacy"):
        epsilon = "not known here" if account["epsilon"] is None else f"{account['epsilon']:.3g} at most"
        told = "" if account["losses_told"] or summary["topology"] == "central" else "; sites tell no losses"
        words = f"privacy: ε {epsilon} at δ {account['delta']:g} for each {account['unit']} (fedloom privacy RUN){told}"
        stderr.print(printable(words), soft_wrap=True)


def _shown(value: float | int | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
