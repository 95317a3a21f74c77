"""`python -m tests.faults [WORDS]`: every cell of the fault matrix, as a page on standard output (docs/faults.md).

Words choose the cells whose names have all of them. What was tried is kept in `runs/faults`, a line for each cell, so
that a matrix which was interrupted goes on; `--again` begins anew, `--page` writes the page of what is there. The
folders of a cell that is not well are kept there, too.
"""

from __future__ import annotations

import json
import re
import sys
from hashlib import sha256
from itertools import count, groupby
from pathlib import Path
from typing import Any

from core_training.foundation.stopping import stopping_at_once
from tests.faults.cells import CELLS, Cell
from tests.faults.page import page
from tests.faults.trial import Trials, Verdict

KEPT = Path("runs/faults/verdicts.jsonl")
_AT_A_TIME = 30
"""Cells of one topology before it is the other's turn."""

_RESTARTED_AFTER = 15
"""Cells after which all of a world is stopped, and must leave nothing; a supervisor then forgets what died."""


def main() -> None:
    """Try the cells of the command line, or all of them, that were not tried yet."""
    options = {word for word in sys.argv[1:] if word.startswith("--")}
    words = [word for word in sys.argv[1:] if word not in options]
    if "--again" in options:
        KEPT.unlink(missing_ok=True)
    if "--page" not in options:
        chosen = [cell for cell in CELLS if all(word in cell.name for word in words)]
        with stopping_at_once():  # so that a world which is under way leaves no process behind
            _try([cell for cell in chosen if cell.name not in _kept()])
    sys.stdout.write(page(_kept()))


def _try(cells: list[Cell]) -> None:
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    for topology, of_topology in groupby(_in_turns(cells), key=lambda cell: cell.topology):
        trials = None
        try:
            for number, cell in enumerate(of_topology):
                if trials is None:
                    trials = Trials(topology)
                    trials.warm_up()
                verdict = trials.try_cell(cell)
                if verdict.is_well and number % _RESTARTED_AFTER == _RESTARTED_AFTER - 1:
                    trials.restart(verdict)
                _keep(verdict)
                if not verdict.is_well:
                    trials.world.keep(KEPT.parent / re.sub(r"\W+", "-", cell.name))
                    trials.close()
                    trials = None
        finally:
            if trials is not None:
                trials.close()


def _in_turns(cells: list[Cell]) -> list[Cell]:
    """The cells in an order of which every beginning is a sample of all, some of each topology at a time."""
    mixed = sorted(cells, key=lambda cell: sha256(cell.name.encode()).digest())
    turns = {topology: count() for topology in ("federated", "gossip")}
    numbered = [(next(turns[cell.topology]) // _AT_A_TIME, cell.topology, cell) for cell in mixed]
    return [cell for *_, cell in sorted(numbered, key=lambda one: one[:2])]


def _keep(verdict: Verdict) -> None:
    with KEPT.open("a", encoding="utf-8") as file:
        file.write(json.dumps(verdict.document()) + "\n")
    said = "well" if verdict.is_well else f"NOT WELL {verdict.lost or verdict.hung or verdict.wrong}"
    helped = f", helped: {'; '.join(verdict.helped)}" if verdict.helped else ""
    sys.stderr.write(f"{verdict.cell.name}: {said}, {verdict.seconds} s ({verdict.over:+} s){helped}\n")
    sys.stderr.flush()


def _kept() -> dict[str, dict[str, Any]]:
    """The newest verdict on each cell of the matrix, by the cell's name, in the order of the matrix."""
    lines = KEPT.read_text(encoding="utf-8").splitlines() if KEPT.exists() else []
    found = {verdict["name"]: verdict for verdict in map(json.loads, lines)}
    return {cell.name: found[cell.name] for cell in CELLS if cell.name in found}


if __name__ == "__main__":
    main()
