"""A federated run's commits: after each round, its state and figures are on disk before the next one starts.

Knows nothing of Flower or of how a state came about.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from core_training.foundation.durable import commit_folder
from core_training.foundation.errors import ProtocolError, RunError
from core_training.foundation.state import Manifest, TrainableState
from core_training.runs.checkpoints import STATE_FILE, prune_checkpoints
from core_training.runs.run_folder import RunFolder
from server.progress import Progress


class RunStore:
    """The checkpoints of one run folder."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def commit(self, progress: Progress, state: TrainableState) -> None:
        """Make round `progress.round` the one a restart goes on from."""
        target = self._folder.checkpoints / f"round-{progress.round:06d}"
        with commit_folder(target) as scratch:
            (scratch / STATE_FILE).write_bytes(state.to_bytes())
            document = {"manifest": state.manifest.to_json(), "progress": progress.to_json()}
            (scratch / "round.json").write_text(json.dumps(document), encoding="utf-8")
        prune_checkpoints(self._folder.checkpoints, "round-*")

    def latest(self) -> tuple[Progress, TrainableState] | None:
        """The last commit, or None where no round was. Raises RunError when it is damaged."""
        newest: Path | None = max(self._folder.checkpoints.glob("round-*"), default=None)
        if newest is None:
            return None
        try:
            document: dict[str, Any] = json.loads((newest / "round.json").read_text(encoding="utf-8"))
            manifest = Manifest.from_json(document["manifest"])
            state = TrainableState.from_bytes((newest / STATE_FILE).read_bytes(), manifest)
            progress = Progress.from_json(document["progress"])
        except (OSError, ValueError, KeyError, TypeError, ProtocolError) as error:
            raise RunError(f"{newest} is damaged ({error}); remove it to go on from the round before it") from None
        return progress, state
