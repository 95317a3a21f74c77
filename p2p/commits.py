"""A node's commits on disk: after each round its state and account, whole or not at all. The last two are kept."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from core_training.foundation.bounded_reading import read_json
from core_training.foundation.durable import commit_folder
from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import Manifest, TrainableState
from core_training.foundation.strict_json import strict_json
from core_training.runs.checkpoints import STATE_FILE, prune_checkpoints
from p2p.ledger import Ledger
from p2p.messages import Offer
from p2p.remembered import apart, together, whole_manifest
from p2p.transport import CHUNK_BYTES
from strategies.outer_steps.outer_step import Memory
from strategies.ring_scale import Scale

_COMMIT_FILE = "commit.json"


@dataclass(frozen=True)
class Commit:
    """The state after a round, and the senders of its updates. Round 0 is the site's own initial state: none here."""

    round: int = 0
    state: TrainableState | None = None
    memory: Memory = field(default_factory=dict)
    """What the outer step remembers of it."""
    contributors: tuple[str, ...] = ()
    ledger: Ledger = field(default_factory=Ledger)
    scale: Scale | None = None
    """The limits that the updates of the next round are to be written with, where the codec is a ring and they are
    known: a node that adopted a state knows none."""
    void_rounds: int = 0
    """The rounds on the way to this state, up to this one, that changed nothing."""

    @property
    def counted(self) -> int:
        """The rounds that led to this state."""
        return self.round - self.void_rounds

    @property
    def whole(self) -> TrainableState | None:
        """The state with what is remembered of it, as it is handed over."""
        return None if self.state is None else together(self.state, self.memory)

    @cached_property
    def state_digest(self) -> str:
        """Of the whole."""
        whole = self.whole
        return whole.digest if whole else ""

    @property
    def offer(self) -> Offer:
        """The key of `Hello.offer`."""
        return (self.round, len(self.contributors), self.state_digest)


class CommitStore:
    """The commits of one run, in folders `epoch-000001`, … of `folder`: on disk a round keeps the name it had first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def opened_file(self) -> Path:
        """The file of `OpenedSum`, beside the commits."""
        return self._folder / "opened.json"

    def write(self, commit: Commit) -> None:
        """Commit, then drop all but the last two. Raises RunError when the disk refuses; the earlier ones survive."""
        whole = commit.whole
        assert commit.state is not None
        assert whole is not None
        document = {
            "epoch": commit.round,
            "state_digest": commit.state_digest,
            "manifest_digest": commit.state.manifest.digest,
            "contributors": list(commit.contributors),
            "ledger": commit.ledger.to_json(),
            "void_rounds": commit.void_rounds,
            "scale": commit.scale.model_dump() if commit.scale else None,
        }
        with commit_folder(self._path(commit.round)) as scratch:
            whole.write(scratch / STATE_FILE)
            (scratch / _COMMIT_FILE).write_text(strict_json(document, indent=2) + "\n", encoding="utf-8")
        prune_checkpoints(self._folder, "epoch-*")

    def load_last(self, manifest: Manifest, remembers: Collection[str] = ()) -> Commit:
        """The newest commit that is intact; an empty one when there is none. `remembers` names the step's memory."""
        whole_of_it = whole_manifest(manifest, remembers)
        for folder in reversed(self._folders()):
            try:
                document = read_json(folder / _COMMIT_FILE)
                whole = TrainableState.from_bytes((folder / STATE_FILE).read_bytes(), whole_of_it)
                if whole.digest == document["state_digest"]:
                    return _commit(document, *apart(whole, manifest, remembers))
            except (OSError, ValueError, KeyError, TypeError, ProtocolError):
                continue
        return Commit()

    def read(self, number: int, offset: int) -> Iterator[bytes]:
        """The serialised state of a round from `offset` on, in chunks. Raises ProtocolError when it is not kept."""
        try:
            file = (self._path(number) / STATE_FILE).open("rb")
        except OSError:
            raise ProtocolError(f"the state of round {number} is not kept here") from None
        with file:
            file.seek(offset)
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def _path(self, number: int) -> Path:
        return self._folder / f"epoch-{number:06d}"

    def _folders(self) -> list[Path]:
        return sorted(self._folder.glob("epoch-*"))


def _commit(document: dict[str, Any], state: TrainableState, memory: Memory) -> Commit:
    return Commit(
        round=int(document["epoch"]),
        state=state,
        memory=memory,
        contributors=tuple(document["contributors"]),
        ledger=Ledger.from_json(document["ledger"]),
        void_rounds=int(document.get("void_rounds", 0)),
        scale=Scale.from_json(document["scale"]) if document["scale"] else None,
    )
