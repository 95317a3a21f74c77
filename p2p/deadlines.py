"""Deadlines for the others' updates, learned from the rounds before. Pure; the caller holds the clock."""

from __future__ import annotations

from collections import deque
from statistics import median

_REMEMBERED = 20
_SPREADS = 5.0
_LEAST_MARGIN = 0.5
_LEAST_SECONDS = 10.0
_FIRST_SECONDS = 60.0
_FIRST_FACTOR = 10.0


class Deadlines:
    """Deadlines as median + k·MAD of the times at which the last update of a round came in.

    An update that came too late counts as its round's last, so that a deadline that is too short for a slow site grows.
    The margin over the median is never less than half of it, nor than ten seconds. `upper_bound` is the recipe's
    `topology.round_deadline`, in seconds.
    """

    def __init__(self, upper_bound: float) -> None:
        self._upper_bound = upper_bound
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)

    def observe(self, seconds: float) -> None:
        """Note the seconds from a round's begin to its last update."""
        self._seconds.append(seconds)

    def observe_late(self, seconds: float) -> None:
        """Note an update of the round observed last that came only now, so many seconds after its begin."""
        if self._seconds:
            self._seconds[-1] = max(self._seconds[-1], seconds)

    @property
    def typical(self) -> float:
        """Median seconds of a round; 0 before the first one."""
        return median(self._seconds) if self._seconds else 0.0

    def deadline(self, own_seconds: float) -> float:
        """The seconds after a round's begin at which waiting ends.

        `own_seconds` is this node's time to train: before anything was observed the others may take ten times as
        long, and later a node that was slow itself still leaves the others a moment.
        """
        if not self._seconds:
            return min(self._upper_bound, _FIRST_SECONDS + _FIRST_FACTOR * own_seconds)
        # Medians, so that one disturbed round does not stretch all later deadlines.
        deviation = median(abs(one - self.typical) for one in self._seconds)
        # Rounds of equal length have no deviation: the least margins leave room for the first slow one.
        margin = max(_SPREADS * deviation, _LEAST_MARGIN * self.typical, _LEAST_SECONDS)
        return min(self._upper_bound, max(self.typical + margin, own_seconds + _LEAST_SECONDS))
