"""Bells that threads ring and calls listen for: something is there for whoever goes by this key."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection, Hashable
from contextlib import suppress


class Bells:
    """The bells of one server. One that was rung goes on until it is silenced, so that nobody comes too late."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ringing: set[Hashable] = set()
        self._listeners: dict[Hashable, set[_Listener]] = {}
        self._is_over = False

    def ring(self, key: Hashable) -> None:
        """Let everybody know who listens for this key, now or later."""
        with self._lock:
            self._ringing.add(key)
            for listener in self._listeners.get(key, ()):
                listener.wake()

    def silence(self, keys: Collection[Hashable]) -> None:
        """There is nothing for these keys."""
        with self._lock:
            self._ringing.difference_update(keys)

    def let_go(self) -> None:
        """Have nobody listen any more: the server ends."""
        with self._lock:
            self._is_over = True
            for listeners in self._listeners.values():
                for listener in listeners:
                    listener.wake()

    async def listen(self, keys: Collection[Hashable]) -> None:
        """Wait until one of these is rung."""
        listener = _Listener()
        with self._lock:
            if self._is_over or not self._ringing.isdisjoint(keys):
                return
            for key in keys:
                self._listeners.setdefault(key, set()).add(listener)
        try:
            await listener.called.wait()
        finally:
            with self._lock:
                for key in keys:
                    self._listeners[key].discard(listener)
                    if not self._listeners[key]:
                        del self._listeners[key]


class _Listener:
    """A call of an event loop that waits to be woken, from whatever thread."""

    def __init__(self) -> None:
        self.called = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def wake(self) -> None:
        with suppress(RuntimeError):  # its loop has ended, and with it the call
            self._loop.call_soon_threadsafe(self.called.set)
