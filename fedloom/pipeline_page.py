"""The report on a pipeline: its steps and gates as tables, what models came out like, and the curves of training."""

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
from fedloom.evaluation_page import REPORT
from fedloom.page import page, table
from fedloom.run_curves import read_runs
from fedloom.step_figures import in_a_line, in_full, read_results


def write_page(pipeline: Pipeline, outcomes: Sequence[StepOutcome], target: Path) -> None:
    """Write the page of what became of the steps. Raises RunError when the disk refuses."""
    title = f"Pipeline {pipeline.source.stem}"
    parts = [f"<h1>{html.escape(title)}</h1>", table(_COLUMNS, [_row(one) for one in outcomes])]
    parts += [part for one in outcomes for part in _found(one)]
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
    if (results := _results(outcome)) is not None:
        figures = in_a_line(results)
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


def _results(outcome: StepOutcome) -> dict[str, Any] | None:
    """What a step found that evaluates or compares; not what an earlier one did, where it came to no end."""
    has_ended = outcome.status != "failed" or bool(outcome.gates)
    return read_results(outcome.run) if has_ended else None


def _found(outcome: StepOutcome) -> list[str]:
    """What a step found, and the way to its own page."""
    if (results := _results(outcome)) is None:
        return []
    parts = [f"<h2>{html.escape(outcome.name)}</h2>", *in_full(results)]
    if (outcome.run / REPORT).is_file():
        parts.append(f'<p><a href="{html.escape(outcome.run.name)}/{REPORT}">Its own report</a></p>')
    return parts


def _gate_row(name: str, gate: Any) -> list[str]:
    return [
        name,
        gate.figure,
        "–" if gate.value is None else f"{gate.value:.6g}",
        gate.text,
        "–" if gate.limit is None else f"{gate.limit:.6g}",
        "passed" if gate.passed else "failed",
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
