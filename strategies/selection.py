"""The values that travel in a round with `privacy.keep` below 1: a random mask, alike at all sites and known to all.

Only such a mask can meet secure aggregation: sites that each chose their largest values would send different ones, and
the choice alone would say something of the data. Values that do not travel stay as they were when the round began.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from strategies.draws import PIECE, draws, key_of


class Selection:
    """Each of `size` values is in it with probability `keep` (a multiple of 2⁻¹⁶), independently of the others.

    The mask is made piece by piece whenever it is needed, so that a large state needs no second one beside it.
    """

    def __init__(self, size: int, keep: float, key: bytes) -> None:
        self._key = key
        self._below = max(1, round(keep * 65536))
        starts = range(0, size, PIECE)
        self.count = sum(int(np.count_nonzero(self.piece(start, min(start + PIECE, size)))) for start in starts)
        """The number of values that travel."""

    def piece(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """The mask of the values from `start` to before `stop`."""
        first = start - start % PIECE
        blocks = [draws(self._key, block, PIECE) for block in range(first, stop, PIECE)]
        return np.concatenate(blocks)[start - first : stop - first] < self._below


def selection_of(size: int, keep: float, seed: int, round: int) -> Selection | None:
    """The selection of a round; None where everything travels."""
    return Selection(size, keep, key_of("selection", seed, round)) if keep < 1 else None
