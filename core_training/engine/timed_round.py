"""A round that ends by time (`topology.local_seconds`): when to stop, and how far the learning rate's schedule is.

A site's number of steps is not known before, so the schedule goes by milliseconds: a round has as many of its places
as milliseconds, each step takes those that went by, and at a round's end all sites stand at one place, whatever they
did. Knows no model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol


class Scheduled(Protocol):
    """A loop of steps, each of which moves its schedule on by one place."""

    def skip(self, steps: int) -> None:
        """Move the schedule on by so many places more."""
        ...

    def stop(self) -> None:
        """Let the running slice end after its present step."""
        ...


class TimedRound:
    """One round of a loop, from now on."""

    def __init__(
        self,
        loop: Scheduled,
        seconds: float,
        then: Callable[[int, int], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`then` is told of each step afterwards."""
        self._loop = loop
        self._seconds = seconds
        self._then = then
        self._clock = clock
        self._began = clock()
        self._place = 0
        self._places = math.ceil(1000 * seconds)

    def after_step(self, step: int, total: int) -> None:
        """Take note of a step, which may be the last."""
        self._place += 1
        passed = self._clock() - self._began
        self._move_to(min(int(1000 * passed), self._places))
        if passed >= self._seconds:
            self._loop.stop()
        if self._then is not None:
            self._then(step, total)

    def end(self) -> None:
        """Stand at the round's end, whatever time it took."""
        self._move_to(self._places)

    def _move_to(self, place: int) -> None:
        if place > self._place:  # a step is never less than a place, so a slice of as many steps ends in time
            self._loop.skip(place - self._place)
            self._place = place
