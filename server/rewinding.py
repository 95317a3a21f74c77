"""Takes a run back to the end of an earlier round whose state is still kept, as files; knows no processes.

What was poisoned in later rounds is gone with their states. A site that poisoned it would send the very same again, so
a run may be told to go on without some sites.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from core_training.foundation.durable import commit_file
from core_training.foundation.errors import InputError
from core_training.recipe.reading import load_recipe
from core_training.runs import events
from core_training.runs.checkpoints import has_best
from core_training.runs.run_folder import RunFolder
from server.evaluation_requests import forget_all
from server.federation import LEFT_OUT, left_out
from server.run_store import RunStore

_RESULTS = ("adapter", "model", "layers")


def check_rewind(run_dir: Path, to: int) -> None:
    """Raise InputError, naming what can be done, where a run cannot be taken back to the end of round `to`."""
    folder, recipe = RunFolder(run_dir), load_recipe(run_dir / "recipe.yaml")
    if recipe.privacy.secure is not None:
        raise InputError(
            f"{run_dir.name} cannot be taken back: it aggregates securely, and its sites mask no round twice. "
            "Submit the recipe anew"
        )
    store = RunStore(folder, recipe.topology.keep_rounds)
    kept = store.rounds()
    if to not in (possible := [0, *kept]):
        raise InputError(
            f"--to {to}: {run_dir.name} can be taken back to the end of round {', '.join(map(str, possible))} (0: its "
            f"start); of committed rounds the last {recipe.topology.keep_rounds} are kept (topology.keep_rounds)"
        )
    best = store.read(to)[0].best_at if to else None
    if recipe.training.load_best_model_at_end and best and not has_best(folder.checkpoints, best):
        raise InputError(
            f"--to {to}: the best state so far, of round {best}, was kept no longer once a later one was better; take "
            "the run back to its start (--to 0)"
        )


def rewind(run_dir: Path, to: int, without: Sequence[str] = ()) -> None:
    """Take a run back to the end of round `to`, to go on without some of its sites.

    Raises InputError: see `check_rewind`. Killed on the way, it leaves a run that goes on from some round, and can be
    called again.
    """
    check_rewind(run_dir, to)
    folder = RunFolder(run_dir)
    leave_out = sorted({*left_out(run_dir), *without})
    # First of all: a run that is finished is not gone on with.
    (run_dir / "summary.json").unlink(missing_ok=True)
    commit_file(run_dir / LEFT_OUT, json.dumps(leave_out).encode())
    store = RunStore(folder)
    counted = store.read(to)[0].counted if to else 0
    store.remove_after(to)
    for name in _RESULTS:
        shutil.rmtree(run_dir / name, ignore_errors=True)
    forget_all(run_dir)
    folder.event(events.Rewound(round=to, rounds_done=counted, without=leave_out))
