"""An event loop whose clock jumps to the next timer when there is nothing to do: hours of waiting take no time.

Used to run many real gossip nodes in one process, repeatably. Knows nothing of nodes or networks.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop with a clock of its own, which starts at 0 and stands still while anything runs."""

    def __init__(self) -> None:
        self._virtual_now = 0.0
        self._holds = 0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self._virtual_now

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Let the clock stand still meanwhile, even when all wait: for work that goes on outside the loop."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1

    def pass_time(self, seconds: float | None) -> float | None:
        """The real time to wait for `seconds` of virtual time: none, but for ever while held."""
        if self._holds:
            return 0 if seconds == 0 else None
        if seconds is not None and seconds > 0:
            self._virtual_now += seconds
            return 0
        return seconds


class _JumpingSelector(selectors.DefaultSelector):
    """A selector of real events; the loop's waiting passes on its virtual clock instead."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(self._loop.pass_time(timeout))


def run_virtually(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Do `asyncio.run` on a `VirtualTimeLoop`."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.get_loop().set_exception_handler(_tell_of_errors)
        return runner.run(work)


def _tell_of_errors(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Tell what asyncio tells, but for a signal that ends a task: whoever runs the loop hears of it."""
    if not isinstance(context.get("exception"), KeyboardInterrupt):
        loop.default_exception_handler(context)
