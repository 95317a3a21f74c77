"""The values that travel in a round: whole tensors of the state, and of those a random share (`privacy.keep`).

Alike at all sites and known to all: only such a choice can meet secure aggregation. Sites that each chose their largest
values would send different ones, and the choice alone would say something of the data. Values that do not travel stay
as they were when the round began.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from core_training.foundation.state import Manifest
from strategies.draws import PIECE, draws, key_of


class Selection:
    """Of the tensors in `travels` (all: None) each value is in it with probability `keep`, independently of the others.

    `keep` is a multiple of 2⁻¹⁶, drawn with `key`. The mask is made piece by piece whenever it is needed, so that a
    large state needs no second one beside it.
    """

    def __init__(self, manifest: Manifest, keep: float, key: bytes, travels: Sequence[bool] | None = None) -> None:
        self._key = key
        self._below = max(1, round(keep * 65536))
        self._travels = travels
        size = manifest.size
        self._ends = np.cumsum([spec.size for spec in manifest.tensors])
        starts = range(0, size, PIECE)
        self.count = sum(int(np.count_nonzero(self.piece(start, min(start + PIECE, size)))) for start in starts)
        """The number of values that travel."""

    def piece(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """The mask of the values from `start` to before `stop`."""
        whole = self._in_whole_tensors(start, stop)
        if self._below >= 65536:
            return whole
        first = start - start % PIECE
        blocks = [draws(self._key, block, PIECE) for block in range(first, stop, PIECE)]
        return whole & (np.concatenate(blocks)[start - first : stop - first] < self._below)

    def _in_whole_tensors(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        if self._travels is None:
            return np.ones(stop - start, dtype=np.bool_)
        tensors = np.searchsorted(self._ends, np.arange(start, stop), side="right")
        chosen: npt.NDArray[np.bool_] = np.asarray(self._travels, dtype=np.bool_)[tensors]
        return chosen


def selection_of(
    manifest: Manifest, keep: float, seed: int, round: int, travels: Sequence[bool] | None = None
) -> Selection | None:
    """The selection of a round; None where everything travels."""
    if keep >= 1 and travels is None:
        return None
    return Selection(manifest, keep, key_of("selection", seed, round), travels)
