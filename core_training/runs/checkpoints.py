"""The checkpoints of a run: what lies in one, and which are kept. What a trainer needs besides is its own affair."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from core_training.foundation.errors import ProtocolError, RunError
from core_training.foundation.state import Manifest, TrainableState

KEPT_CHECKPOINTS = 2
STATE_FILE = "state.safetensors"
NOTES_FILE = "notes.json"


def read_checkpoint(folder: Path, manifest: Manifest) -> tuple[TrainableState, dict[str, Any]]:
    """State and notes of a checkpoint. Raises RunError when it is damaged or has another manifest."""
    try:
        state = TrainableState.from_bytes((folder / STATE_FILE).read_bytes(), manifest)
        return state, json.loads((folder / NOTES_FILE).read_text())
    except (OSError, ValueError, ProtocolError) as error:
        raise RunError(f"{folder}: not a checkpoint of this run: {error}") from None


def prune_checkpoints(folder: Path, pattern: str) -> None:
    """Remove all but the newest `KEPT_CHECKPOINTS` of the checkpoints matching `pattern` (their names sort by age)."""
    for old in sorted(folder.glob(pattern))[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)
