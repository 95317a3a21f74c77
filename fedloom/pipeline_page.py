"""The report on a pipeline: its steps and gates as tables, and the curves of those that trained in one picture."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core_training.foundation.durable import commit_file
from core_training.runs.run_folder import RunFolder
from experiments.carrying_out import StepOutcome
from experiments.pipeline import Pipeline
from fedloom.curves_page import parts_of
from fedloom.page import page, table
from fedloom.run_curves import read_runs


def write_page(pipeline: Pipeline, outcomes: Sequence[StepOutcome], target: Path) -> None:
    """Write the page of what became of the steps. Raises RunError when the disk refuses."""
    title = f"Pipeline {pipeline.source.stem}"
    parts = [f"<h1>{html.escape(title)}</h1>", table(_COLUMNS, [_row(one) for one in outcomes])]
    if gates := [_gate_row(one.name, gate) for one in outcomes for gate in one.gates]:
        parts.append("<h2>Gates</h2>" + table(["step", "figure", "value", "gate", "limit", ""], gates))
    if failed := [one for one in outcomes if one.status == "failed"]:
        parts.append(f"<p>{html.escape(failed[0].why)}</p>")
    runs = [one.run for one in outcomes if (one.run / "recipe.yaml").is_file() and (one.run / "checkpoints").is_dir()]
    if runs:
        parts.append("<h2>Runs</h2>" + "\n".join(parts_of(read_runs(runs))))
    commit_file(target, page(title, parts).encode())


_COLUMNS = ["step", "what", "status", "loss before", "loss after", "other figures", "seconds", "why"]


def _row(outcome: StepOutcome) -> list[str]:
    summary: dict[str, Any] = RunFolder(outcome.run).summary() or {}
    figures = ", ".join(f"{name} {value:.4g}" for name, value in (summary.get("metrics") or {}).items())
    seconds = (summary.get("seconds") or {}).get("total")
    return [
        outcome.name,
        outcome.what,
        outcome.status,
        _number(summary.get("eval_loss_initial")),
        _number(summary.get("eval_loss")),
        figures or "–",
        "–" if seconds is None else f"{seconds:.0f}",
        outcome.why if outcome.status != "failed" else "see below",
    ]


def _gate_row(name: str, gate: Any) -> list[str]:
    return [
        name,
        gate.figure,
        f"{gate.value:.6g}",
        gate.text,
        f"{gate.limit:.6g}",
        "passed" if gate.passed else "failed",
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
