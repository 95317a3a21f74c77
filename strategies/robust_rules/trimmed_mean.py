"""The coordinate-wise trimmed mean (Yin et al. 2018)."""

from __future__ import annotations

import math

import numpy as np

from core_training.foundation.state import Manifest
from core_training.parts.aggregation_rules.trimmed_mean import TrimmedMean
from strategies.robust_rules.kept_updates import ByValue, Values


class TrimmedMeanOfValues(ByValue):
    """Leaves out the largest and the smallest of each value; of few sites as many as leave one, or two."""

    def __init__(self, manifest: Manifest, settings: TrimmedMean) -> None:
        super().__init__(manifest)
        self._share = settings.share

    def _of_values(self, values: Values) -> Values:
        count = len(values)
        # 0.07 × 100 is a little more than 7.
        out = min(math.ceil(self._share * count - 1e-9), (count - 1) // 2)
        kept: Values = np.sort(values, axis=0)[out : count - out].mean(axis=0)
        return kept
