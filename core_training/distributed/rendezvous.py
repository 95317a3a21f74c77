"""The meeting place of a group's processes on one machine: a store that nothing outside the machine can reach.

torchrun's own rendezvous listens on every interface, asks nobody for a key, and unpickles what it is sent.
"""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

LOOPBACK = "127.0.0.1"
_ANSWERS_WITHIN = timedelta(minutes=10)


class LoopbackRendezvous(RendezvousHandler):
    """The rendezvous of one launcher with itself; its processes use the same store."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        listener = socket.create_server((LOOPBACK, 0))
        self._port = listener.getsockname()[1]
        self._store = TCPStore(
            LOOPBACK, self._port, is_master=True, timeout=_ANSWERS_WITHIN, wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )  # fmt: skip

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return "loopback"

    def next_rendezvous(self) -> RendezvousInfo:
        meeting_point = RendezvousStoreInfo(LOOPBACK, self._port)
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
        return True


def _loopback(parameters: RendezvousParameters) -> LoopbackRendezvous:
    return LoopbackRendezvous(parameters.run_id)


rendezvous_handler_registry.register("loopback", _loopback)
