"""What a federated run must not lose: after each round, its state and figures are on disk before the next one starts.

Knows nothing of Flower or of how a state came about.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from core_training.central import prune_checkpoints
from core_training.durable import commit_folder
from core_training.errors import ProtocolError, RunError
from core_training.run_folder import RunFolder
from core_training.state import Manifest, TrainableState


@dataclass
class SiteProgress:
    """What the server remembers of one site."""

    train_examples: int
    eval_examples: int
    rounds: int = 0
    eval_loss_initial: float | None = None
    eval_loss: float | None = None


@dataclass
class Progress:
    """Everything of a run but its state. `round` is the last committed one."""

    round: int = 0
    train_loss_first: float | None = None
    train_loss_last: float | None = None
    eval_loss_initial: float | None = None
    best_eval_loss: float | None = None
    evaluations_without_gain: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    tokens: int = 0
    seconds_total: float = 0.0
    seconds_training: float = 0.0
    seconds_exchange: float = 0.0
    sites: dict[str, SiteProgress] = field(default_factory=dict)


class RunStore:
    """The checkpoints of one run folder."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def commit(self, progress: Progress, state: TrainableState) -> None:
        """Make round `progress.round` the one a restart goes on from."""
        target = self._folder.checkpoints / f"round-{progress.round:06d}"
        with commit_folder(target) as scratch:
            (scratch / "state.safetensors").write_bytes(state.to_bytes())
            document = {"manifest": state.manifest.to_json(), "progress": asdict(progress)}
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
            state = TrainableState.from_bytes((newest / "state.safetensors").read_bytes(), manifest)
            progress = Progress(**document["progress"])
            progress.sites = {name: SiteProgress(**site) for name, site in document["progress"]["sites"].items()}
        except (OSError, ValueError, KeyError, TypeError, ProtocolError) as error:
            raise RunError(f"{newest} is damaged ({error}); remove it to go on from the round before it") from None
        return progress, state
