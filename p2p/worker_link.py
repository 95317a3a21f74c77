"""Lets a node put orders to its site's resident worker without stopping to answer its peers meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from client import worker_client
from core_training import background
from p2p.site_orders import Ask
from strategies.exchange import Envelope


@contextmanager
def worker_of(folder: Path) -> Iterator[Ask]:
    """The site's worker, started unless one runs already, and stopped at the end.

    One that runs already was left by a node that was killed: it is as good as a new one, and has the model loaded.
    """
    lock = worker_client.worker_lock(folder)
    if background.owner(lock) is None:
        worker_client.start_worker(folder)

    async def ask(order: Envelope) -> Envelope:
        return await _in_thread(folder, order)

    try:
        yield ask
    finally:
        background.stop(lock)


async def _in_thread(folder: Path, order: Envelope) -> Envelope:
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
            result = worker_client.ask(folder, order)
        except Exception as error:
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(hand_over, result, failure)

    threading.Thread(target=work, name="ask-worker", daemon=True).start()
    return await reply
