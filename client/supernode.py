"""Flower's SuperNode, which asks the server for orders more often while a run goes on. `python -m client.supernode …`
takes the options of `flower-supernode`.

Flower pauses for three seconds whenever there is no order, and every exchange of a round waits for that; a secure round
has one exchange more than a plain one. Here the pause is a tenth of the time since the last order, so that a round
under way is hardly held up, and a server with many idle sites is asked no more than before.
"""

from __future__ import annotations

import time
from types import SimpleNamespace

from flwr.supernode import start_client_internal
from flwr.supernode.cli import flower_supernode

LEAST_PAUSE = 0.2
FLOWERS_PAUSE = 3


class _Pauses:
    """Stands in for `time.sleep` in Flower's loop, which sleeps shorter than `FLOWERS_PAUSE` while it has an order."""

    def __init__(self) -> None:
        self._last_order = time.monotonic()

    def sleep(self, seconds: float) -> None:
        if seconds < FLOWERS_PAUSE:
            self._last_order = time.monotonic()
        waited = time.monotonic() - self._last_order
        time.sleep(min(seconds, max(LEAST_PAUSE, waited / 10)))


def main() -> None:
    """Run the SuperNode until it is stopped."""
    start_client_internal.time = SimpleNamespace(**{**vars(time), "sleep": _Pauses().sleep})
    flower_supernode()


if __name__ == "__main__":
    main()
