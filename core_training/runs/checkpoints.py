"""The checkpoints of a run: what lies in one, and which are kept. What a trainer needs besides is its own affair."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core_training.foundation.bounded_reading import read_json
from core_training.foundation.durable import commit_folder
from core_training.foundation.errors import ProtocolError, RunError
from core_training.foundation.state import Manifest, TrainableState
from core_training.foundation.strict_json import strict_json

KEPT_CHECKPOINTS = 2
STATE_FILE = "state.safetensors"
NOTES_FILE = "notes.json"


def read_checkpoint(folder: Path, manifest: Manifest) -> tuple[TrainableState, dict[str, Any]]:
    """State and notes of a checkpoint. Raises RunError when it is damaged or has another manifest."""
    try:
        state = TrainableState.from_bytes((folder / STATE_FILE).read_bytes(), manifest)
        return state, read_json(folder / NOTES_FILE)
    except (OSError, ValueError, ProtocolError) as error:
        raise RunError(f"{folder}: not a checkpoint of this run: {error}") from None


def prune_checkpoints(folder: Path, pattern: str, keep: int = KEPT_CHECKPOINTS) -> None:
    """Remove all but the newest `keep` of the checkpoints matching `pattern` (their names sort by age)."""
    for old in sorted(folder.glob(pattern))[:-keep]:
        shutil.rmtree(old)


def remove_later(folder: Path, pattern: str, last: str) -> None:
    """Remove the checkpoints matching `pattern` that come after the one named `last`, the newest first.

    Killed on the way, it leaves no gap.
    """
    for later in sorted((path for path in folder.glob(pattern) if path.name > last), reverse=True):
        shutil.rmtree(later)


def keep_best(checkpoints: Path, at: int, state: TrainableState, notes: Mapping[str, Any]) -> None:
    """Keep the state at the end of step or round `at`, the best so far, beside the checkpoints.

    An earlier best one stays until `prune_best`: a checkpoint that a run goes back to may know only that.
    """
    with commit_folder(_best(checkpoints, at)) as scratch:
        state.write(scratch / STATE_FILE)
        (scratch / NOTES_FILE).write_text(strict_json(dict(notes)), encoding="utf-8")


def read_best(checkpoints: Path, at: int, manifest: Manifest) -> tuple[TrainableState, dict[str, Any]]:
    """What `keep_best` kept. Raises RunError when it is damaged or gone."""
    return read_checkpoint(_best(checkpoints, at), manifest)


def has_best(checkpoints: Path, at: int) -> bool:
    """Whether `read_best` would find a state."""
    return _best(checkpoints, at).is_dir()


def prune_best(checkpoints: Path, at: int | None) -> None:
    """Remove all best states but the one of step or round `at`, once a checkpoint knows it."""
    for old in checkpoints.glob("best-*"):
        if at is None or old != _best(checkpoints, at):
            shutil.rmtree(old)


def _best(checkpoints: Path, at: int) -> Path:
    return checkpoints / f"best-{at:08d}"
