"""The coordinate-wise median (Yin et al. 2018): of an even number of sites, the mean of the middle two."""

from __future__ import annotations

import numpy as np

from strategies.robust_rules.kept_updates import ByValue, Values


class Median(ByValue):
    """Fewer than half of the sites cannot move a value beyond what the others sent."""

    def _of_values(self, values: Values) -> Values:
        middle: Values = np.median(values, axis=0)
        return middle
