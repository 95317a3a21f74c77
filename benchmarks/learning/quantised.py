"""Six real sites under each codec, masked where it is a ring: how far each run's loss lies from that of whole states.

Runs that `runs/bench/quantised` holds already, completed and of the same recipe, are not run again: remove the folder
to start afresh.
"""

from __future__ import annotations

from typing import Any

from benchmarks.figure import Figure
from benchmarks.learning.kept_runs import trained_together
from benchmarks.places import OUTPUT, Places
from core_training.runs.run_folder import RunFolder

_EXACT = "fp32"
_MASKED = "privacy.secure_aggregation=true"
_RUNS = {
    _EXACT: [],
    "ring16, masked": [_MASKED],
    "ring16, masked, gossip": [_MASKED, "topology.kind=gossip"],
    "bf16": ["privacy.codec=bf16"],
    "ring24, masked": [_MASKED, "privacy.codec=ring24"],
    "ring16, masked, half of the values": [_MASKED, "privacy.keep=0.5"],
}


def measure(places: Places) -> Figure:
    folder = OUTPUT / "quantised"
    summaries: dict[str, dict[str, Any]] = {}
    for label, overrides in _RUNS.items():
        run = RunFolder(
            trained_together(places.recipe(*overrides), folder / label.replace(", ", "-").replace(" ", "-"))
        )
        summaries[label] = run.summary() or {}
    exact = summaries[_EXACT]["eval_loss"]
    apart = {label: abs(summary["eval_loss"] - exact) / exact for label, summary in summaries.items()}
    return Figure(
        name="quantised",
        meaning="held-out loss of masked ring16 apart from fp32's, six sites",
        value=apart["ring16, masked"],
        unit="",
        target=0.01,
        details={
            label: {
                "eval_loss": summary["eval_loss"],
                "apart": apart[label],
                "bytes_up": summary["bytes_up"],
                "saturated": summary["saturated"],
                "seconds": summary["seconds"],
                "state_digest": summary["state_digest"],
            }
            for label, summary in summaries.items()
        },
    )
