"""The link by which a node puts orders to its site's resident worker without stopping to answer its peers meanwhile.

A worker that dies is started again and given the order again, which it answers as if it had lived.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from client import worker_client
from core_training.foundation import background
from core_training.foundation.errors import RunError
from p2p.site_orders import Ask
from strategies.messages import Envelope

_RESTARTS = 3
"""The restarts of the worker over one order, at most."""


@contextmanager
def worker_of(folder: Path) -> Iterator[Ask]:
    """The site's worker, kept going until the block ends.

    One that runs already was left by a node that was killed, maybe in the middle of an order: a new one replaces it.
    """
    worker = _KeptWorker(folder)
    worker.start()

    async def ask(order: Envelope) -> Envelope:
        return await _in_thread(worker, order)

    try:
        yield ask
    finally:
        worker.end()


class _KeptWorker:
    """A worker that is started again when it is lost, unless it is lost again and again over one order."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = worker_client.worker_lock(folder)
        self._changing = threading.Lock()
        self._ended = False
        self._restarts = 0

    def start(self) -> None:
        background.stop(self._lock)
        worker_client.start_worker(self._folder)

    def ask(self, order: Envelope) -> Envelope:
        """Raise RunError when the worker cannot be kept going."""
        self._restarts = 0
        return worker_client.ask(
            self._folder, order, patience=worker_client.STARTS_WITHIN, restart=self._start_again_if_lost
        )

    def end(self) -> None:
        with self._changing:
            self._ended = True
        background.stop(self._lock)

    def _start_again_if_lost(self) -> None:
        with self._changing:
            if self._ended:
                raise RunError("the node is ending")
            if background.owner(self._lock) is not None:
                return  # it is still starting
            log = worker_client.worker_log(self._folder)
            if self._restarts == _RESTARTS:
                raise RunError(f"the worker ended again after {_RESTARTS} restarts; {log} says why")
            self._restarts += 1
            background.start(worker_client.worker_command(self._folder), self._lock, log)


async def _in_thread(worker: _KeptWorker, order: Envelope) -> Envelope:
    # A daemon thread: unlike one of asyncio's own, it does not keep a node that is stopped from ending.
    loop = asyncio.get_running_loop()
    reply: asyncio.Future[Envelope] = loop.create_future()

    def hand_over(result: Envelope | None, error: Exception | None) -> None:
        if reply.done():
            return
        if error is not None:
            reply.set_exception(error)
        elif result is not None:
            reply.set_result(result)

    def work() -> None:
        result, failure = None, None
        try:
            result = worker.ask(order)
        except Exception as error:
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(hand_over, result, failure)

    threading.Thread(target=work, name="ask-worker", daemon=True).start()
    return await reply
