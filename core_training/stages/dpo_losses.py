"""The losses of stage `dpo`: one table of functions of a pair alone, so that batches, processes and sites add up.

In the formulas c and r are the log-ratios of the chosen and the rejected answer, Δ = c − r, Δ̄ the same of their means
over tokens, and ε the `label_smoothing`. They know nothing of models or batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from core_training.parts.stages.dpo import Dpo, LossType


@dataclass(frozen=True)
class LogRatios:
    """log π/π_ref (nats) of each pair's two answers, and the answers' numbers of tokens; all of shape (pairs,)."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor

    @property
    def difference(self) -> torch.Tensor:
        """Δ: by how much the chosen answer gained on the rejected one."""
        return self.chosen - self.rejected

    @property
    def mean_difference(self) -> torch.Tensor:
        """Δ̄: the same of the means over each answer's tokens."""
        return self.chosen / self.chosen_tokens - self.rejected / self.rejected_tokens


def sigmoid(pairs: LogRatios, settings: Dpo) -> torch.Tensor:
    """−(1 − ε)·log σ(βΔ) − ε·log σ(−βΔ): DPO (Rafailov et al. 2023, eq. 7).

    With ε it is conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences").
    """
    logits = settings.beta * pairs.difference
    smoothing = settings.label_smoothing
    return -(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits)


def sigmoid_norm(pairs: LogRatios, settings: Dpo) -> torch.Tensor:
    """−log σ(βΔ̄): length-normalised DPO (Lambert et al. 2024, Tülu 3)."""
    return -logsigmoid(settings.beta * pairs.mean_difference)


def ipo(pairs: LogRatios, settings: Dpo) -> torch.Tensor:
    """(Δ̄ − 1/(2β))²: identity preference optimisation (Azar et al. 2023, eq. 17, whose τ is β).

    The paper has no means over tokens; its authors use them, and so does TRL.
    """
    return torch.square(pairs.mean_difference - 1 / (2 * settings.beta))


def hinge(pairs: LogRatios, settings: Dpo) -> torch.Tensor:
    """max(0, 1 − βΔ): the hinge of SLiC (Zhao et al. 2023) on DPO's ratios (Liu et al. 2023, RSO)."""
    return torch.relu(1 - settings.beta * pairs.difference)


def robust(pairs: LogRatios, settings: Dpo) -> torch.Tensor:
    """(−(1 − ε)·log σ(βΔ) + ε·log σ(−βΔ)) / (1 − 2ε): robust DPO (Chowdhury et al. 2024).

    Its mean over pairs of which the share ε is the wrong way round is that of DPO over the right ones.
    """
    logits = settings.beta * pairs.difference
    smoothing = settings.label_smoothing
    return (smoothing * logsigmoid(-logits) - (1 - smoothing) * logsigmoid(logits)) / (1 - 2 * smoothing)


def exo_pair(pairs: LogRatios, settings: Dpo) -> torch.Tensor:
    """KL of (σ(βΔ), σ(−βΔ)) from (1 − ε, ε): efficient exact optimisation (Ji et al. 2024, eq. 16)."""
    logits = settings.beta * pairs.difference
    smoothing = torch.tensor(settings.label_smoothing, device=logits.device)
    won, lost = logsigmoid(logits), logsigmoid(-logits)
    return won.exp() * (won - torch.log1p(-smoothing)) + lost.exp() * (lost - smoothing.log())


def nca_pair(pairs: LogRatios, settings: Dpo) -> torch.Tensor:
    """−log σ(βc) − ½·log σ(−βc) − ½·log σ(−βr): noise contrastive alignment (Chen et al. 2024)."""
    chosen, rejected = settings.beta * pairs.chosen, settings.beta * pairs.rejected
    return -logsigmoid(chosen) - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2


def bco_pair(pairs: LogRatios, settings: Dpo) -> torch.Tensor:
    """−log σ(βc) − log σ(−βr): binary classifier optimisation (Jung et al. 2024).

    The paper shifts both by a running mean over batches. TRL leaves it out here; with it, sites would not add up.
    """
    return -logsigmoid(settings.beta * pairs.chosen) - logsigmoid(-settings.beta * pairs.rejected)


def sppo_hard(pairs: LogRatios, settings: Dpo) -> torch.Tensor:
    """(c − 1/(2β))² + (r + 1/(2β))²: self-play preference optimisation (Wu et al. 2024, eq. 4.7).

    The chosen answer is taken to win for certain.
    """
    goal = 1 / (2 * settings.beta)
    return torch.square(pairs.chosen - goal) + torch.square(pairs.rejected + goal)


def apo_zero(pairs: LogRatios, settings: Dpo) -> torch.Tensor:
    """1 − σ(βc) + σ(βr): anchored preference optimisation (D'Oosterlinck et al. 2024, eq. 7).

    For chosen answers that are better than the model's own.
    """
    return torch.sigmoid(-settings.beta * pairs.chosen) + torch.sigmoid(settings.beta * pairs.rejected)


def apo_down(pairs: LogRatios, settings: Dpo) -> torch.Tensor:
    """σ(βc) + 1 − σ(βΔ): anchored preference optimisation (D'Oosterlinck et al. 2024, eq. 8).

    For chosen answers that are worse than the model's own.
    """
    return torch.sigmoid(settings.beta * pairs.chosen) + torch.sigmoid(-settings.beta * pairs.difference)


def discopop(pairs: LogRatios, settings: Dpo) -> torch.Tensor:
    """−(1 − m)·log σ(βΔ) + m·exp(−βΔ), where m = σ(βΔ/0.05): DiscoPOP (Lu et al. 2024, eq. 5)."""
    logits = settings.beta * pairs.difference
    temperature = 0.05  # the paper's
    # The exponentials are multiplied as one: for itself, the second would overflow where m is 0.
    exponential = torch.exp(logsigmoid(logits / temperature) - logits)
    return exponential - torch.sigmoid(-logits / temperature) * logsigmoid(logits)


DPO_LOSSES: Mapping[LossType, Callable[[LogRatios, Dpo], torch.Tensor]] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "ipo": ipo,
    "hinge": hinge,
    "robust": robust,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
}
"""The loss of each pair by its `loss_type`, shape (pairs,)."""
