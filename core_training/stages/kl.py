"""The policy's distance from the reference policy, and the weight of the penalty on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Estimator = Literal["k1", "k3"]


def kl_estimates(logps: torch.Tensor, reference_logps: torch.Tensor, estimator: Estimator) -> torch.Tensor:
    """KL(policy ‖ reference) in nats, estimated from each token that the policy sampled; the shape of `logps`.

    Both have the right mean: k1 = log π − log π_ref; k3 = e^(−k1) − 1 + k1, which is never negative and varies less
    (Schulman 2020, "Approximating KL divergence").
    """
    # Shapes: logps, reference_logps and estimates (answers, positions).
    k1 = logps - reference_logps
    return k1 if estimator == "k1" else torch.expm1(-k1) + k1


@dataclass
class KLController:
    """The weight of the KL penalty: fixed, or steered so that an answer's KL stays near `target`."""

    coef: float
    target: float | None = None
    horizon: float = 10_000.0

    def update(self, kl: float, answers: int) -> None:
        """Take in that these answers had `kl` nats each, on average (Ziegler et al. 2019, section 2.2)."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * answers / self.horizon
