"""FedYogi (Reddi et al. 2021, algorithm 2): as FedAdam, with v⁺ = v − (1 − β₂)d²·sign(v − d²)."""

from __future__ import annotations

import numpy as np

from strategies.outer_steps.adam import Adam
from strategies.outer_steps.outer_step import Values


class Yogi(Adam):
    """Its second moment grows and shrinks by no more than (1 − β₂)d² a round."""

    def _second_moment(self, before: Values, square: Values) -> Values:
        return before - (1 - self._second_beta) * square * np.sign(before - square)
