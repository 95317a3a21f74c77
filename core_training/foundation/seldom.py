"""What happens again and again, told a few times and then once in a while, with the number of times in between.

Whoever can make a party tell something can make it tell the same for ever, and fill its disk.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

_MOST_SUBJECTS = 10_000


@dataclass
class _Subject:
    """What may still be told of a subject, as of `at`, and how often it was not."""

    left: float
    at: float
    untold: int = 0


class Seldom:
    """An account of what was told of each subject: `burst` times at once, then once in `seconds`."""

    def __init__(self, burst: int, seconds: float) -> None:
        self._burst = burst
        self._seconds = seconds
        self._subjects: OrderedDict[Hashable, _Subject] = OrderedDict()

    def untold(self, subject: Hashable, now: float) -> int | None:
        """How often the subject was left out since it was told last, if it is to be told now; None if it is not.

        `now` is in seconds, of any clock that only goes forward.
        """
        known = self._subjects.setdefault(subject, _Subject(self._burst, now))
        self._subjects.move_to_end(subject)
        if len(self._subjects) > _MOST_SUBJECTS:
            self._subjects.popitem(last=False)
        known.left = min(self._burst, known.left + (now - known.at) / self._seconds)
        known.at = now
        if known.left < 1:
            known.untold += 1
            return None
        known.left -= 1
        untold, known.untold = known.untold, 0
        return untold
