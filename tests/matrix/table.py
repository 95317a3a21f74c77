"""A plugin of pytest: prints the matrix (stage × mode × topology, seconds) after its tests, or writes it to a page.

The page is the file that the environment's MATRIX_PAGE names.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from core_training.parts.stages import STAGES
from core_training.parts.tuning_modes import TUNING_MODES

_TOPOLOGIES = ("central", "federated", "gossip", "secure")
"""As in `tests.matrix.cells`, which a plugin is too early to import."""
_CELL = re.compile(r"test_matrix\.py::test_(\w+)\[(\w+)-(\w+)\]$")
_outcomes: dict[tuple[str, str, str], str] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if (cell := _CELL.search(report.nodeid)) and (report.when == "call" or report.failed):
        _outcomes[cell[2], cell[3], cell[1]] = f"{report.duration:.1f} s" if report.passed else "**failed**"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _outcomes:
        return
    table = _table()
    terminalreporter.section("matrix")
    terminalreporter.write_line(table)
    if page := os.environ.get("MATRIX_PAGE"):
        Path(page).write_text(_HEAD + table + "\n", encoding="utf-8")


def _table() -> str:
    head = [f"{mode} {topology}" for mode in TUNING_MODES for topology in _TOPOLOGIES]
    lines = ["| stage | " + " | ".join(head) + " |", "|---|" + "---|" * len(head)]
    for stage in STAGES:
        cells = [_outcomes.get((stage, mode, topology), "–") for mode in TUNING_MODES for topology in _TOPOLOGIES]
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


_HEAD = """\
# The matrix

Every stage with every tuning mode, in every topology, on a model of two layers. Written by `make matrix`, which runs
all of `tests/matrix` (`make test` a quarter of it, in which every two of a stage, a mode and a topology meet); a cell
holds the seconds its test took when it passed. What each test shows:

- central: the loss before the first step is a closed form's (where nothing is sampled), and it falls; exactly the
  parameters that shall be trained change, all others (of quantised weights: their packed bytes) stay as they are; every
  trained tensor gets a gradient, before an evaluation and after it; a run that was stopped and resumed ends with the
  very state of one that was not.
- federated: with one site the server's result is the central run's, bit for bit; one SGD step of two sites of unequal
  size is one central step on their joined batch (to 1e-5). Where answers are sampled, they are fixed for this.
- gossip: with one node the result is the central run's, bit for bit; two nodes end with the very state of a server's
  mean.
- secure: under secure aggregation three sites end with the very state that the same codec gives in the clear, over a
  server and by gossip alike.

Away from the start, losses and gradients are held against closed forms in
`tests/core_training/stages/test_stage_losses.py`, against TRL's trainers in
`tests/core_training/stages/test_trl_agreement.py`, and for PPO, RLOO and GRPO in
`tests/core_training/stages/test_policy_gradient.py`; results that other tools load are in
`tests/fedloom/test_export.py`.

"""
