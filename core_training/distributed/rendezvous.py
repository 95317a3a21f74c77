"""The meeting place of a group's processes on one machine: a file in a folder that no other account may enter.

torchrun's own rendezvous listens on every interface, asks nobody for a key, and unpickles what it is sent; its store,
wherever it listens, hands its values to whoever connects, and takes theirs.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from torch.distributed import FileStore, PrefixStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

BACKEND = "private"
LOOPBACK = "127.0.0.1"
FOLDER = "FEDLOOM_GROUP_FOLDER"
"""The variable that names the folder to a group's processes."""


class PrivateRendezvous(RendezvousHandler):
    """The rendezvous of one launcher with itself, in `folder`, where its processes then find each other."""

    def __init__(self, run_id: str, folder: Path) -> None:
        self._run_id = run_id
        self._store = FileStore(str(folder / "launcher"))
        # Nobody listens there: DeepSpeed names its shared memory after the port, which no other group must have.
        self._reserved = socket.socket()
        self._reserved.bind((LOOPBACK, 0))

    @property
    def use_agent_store(self) -> bool:
        return False

    def get_backend(self) -> str:
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        meeting_point = RendezvousStoreInfo(LOOPBACK, self._reserved.getsockname()[1])
        return RendezvousInfo(PrefixStore(self._run_id, self._store), 0, 1, meeting_point)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        self._reserved.close()
        return True


def meeting_point() -> str | None:
    """torch's `init_method` for a process of a group that fedloom started; None where another launcher said where."""
    folder = os.environ.get(FOLDER)
    return None if folder is None else f"file://{folder}/processes"


def _private(parameters: RendezvousParameters) -> PrivateRendezvous:
    return PrivateRendezvous(parameters.run_id, Path(parameters.endpoint))


rendezvous_handler_registry.register(BACKEND, _private)
