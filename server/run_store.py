"""A federated run's commits: after each round, its state and figures are on disk before the next one starts.

Knows nothing of Flower or of how a state came about.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from core_training.foundation.bounded_reading import read_json
from core_training.foundation.durable import commit_folder
from core_training.foundation.errors import ProtocolError, RunError
from core_training.foundation.state import Manifest, TrainableState
from core_training.foundation.strict_json import strict_json
from core_training.runs.checkpoints import KEPT_CHECKPOINTS, STATE_FILE, prune_checkpoints, remove_later
from core_training.runs.run_folder import RunFolder
from server.progress import Progress

_MEMORY = "outer-"
_NOTHING: Mapping[str, TrainableState] = MappingProxyType({})


class RunStore:
    """The checkpoints of one run folder, of which the newest `keep` stay."""

    def __init__(self, folder: RunFolder, keep: int = KEPT_CHECKPOINTS) -> None:
        self._folder = folder
        self._keep = keep

    def commit(
        self, progress: Progress, state: TrainableState, memory: Mapping[str, TrainableState] = _NOTHING
    ) -> TrainableState:
        """Make round `progress.round` the one a restart goes on from, with what an outer step or a rule remembers.

        Returns the state as it lies in the commit: memory that the system can have back at any time.
        """
        with commit_folder(self._place(progress.round)) as scratch:
            state.write(scratch / STATE_FILE)
            for name, values in memory.items():
                values.write(scratch / _memory_file(name))
            document = {"manifest": state.manifest.to_json(), "progress": progress.to_json()}
            (scratch / "round.json").write_text(strict_json(document), encoding="utf-8")
        prune_checkpoints(self._folder.checkpoints, "round-*", self._keep)
        return TrainableState.in_file(self._place(progress.round) / STATE_FILE, state.manifest)

    def rounds(self) -> list[int]:
        """The rounds whose commits are kept, the oldest first."""
        return sorted(int(path.name.removeprefix("round-")) for path in self._folder.checkpoints.glob("round-*"))

    def latest(self) -> tuple[Progress, TrainableState] | None:
        """The last commit, or None where no round was. Raises RunError when it is damaged."""
        rounds = self.rounds()
        return self.read(rounds[-1]) if rounds else None

    def read(self, number: int) -> tuple[Progress, TrainableState]:
        """The commit of a round. Raises RunError when it is damaged."""
        place = self._place(number)
        try:
            document: dict[str, Any] = read_json(place / "round.json")
            manifest = Manifest.from_json(document["manifest"])
            state = TrainableState.from_bytes((place / STATE_FILE).read_bytes(), manifest)
            progress = Progress.from_json(document["progress"])
        except (OSError, ValueError, KeyError, TypeError, ProtocolError) as error:
            raise _damaged(place, error) from None
        return progress, state

    def memory(self, number: int, names: Iterable[str] | None, manifest: Manifest) -> dict[str, TrainableState]:
        """What was remembered at the end of a round, as it lies in the commit, by these names (None: by all there are).

        Raises RunError when it is damaged.
        """
        place = self._place(number)
        if names is None:
            names = sorted(path.stem.removeprefix(_MEMORY) for path in place.glob(_memory_file("*")))
        try:
            return {name: TrainableState.in_file(place / _memory_file(name), manifest) for name in names}
        except (OSError, ValueError, ProtocolError) as error:
            raise _damaged(place, error) from None

    def remove_after(self, number: int) -> None:
        """Make round `number` the last commit (0: have none)."""
        remove_later(self._folder.checkpoints, "round-*", self._place(number).name)

    def _place(self, number: int) -> Path:
        return self._folder.checkpoints / f"round-{number:06d}"


def _memory_file(name: str) -> str:
    return f"{_MEMORY}{name}.safetensors"


def _damaged(place: Path, error: Exception) -> RunError:
    return RunError(f"{place} is damaged ({error}); remove it to go on from the round before it")
