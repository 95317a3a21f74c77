"""From rewards to advantages: how much better each token or answer was than expected. Tensors in, tensors out.

Per-token tensors have shape (answers, positions), with a mask of the same shape that is true on the answers' tokens;
an answer's tokens stand next to each other. Outside the mask everything is 0.
"""

from __future__ import annotations

import torch


def generalised_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> torch.Tensor:
    """Σ_k (γλ)^k δ_{t+k} with δ_t = r_t + γV_{t+1} − V_t; nothing follows an answer's last token.

    Schulman et al. 2016, eq. 16.
    """
    advantages = torch.zeros_like(rewards)
    following = next_values = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        next_values = values[:, t] * mask[:, t]
        advantages[:, t] = following
    return advantages


def moments(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(count, sum, sum of squares) of the masked values in float64: those of several batches add up."""
    chosen = values[mask].double()
    return torch.stack([mask.sum().double(), chosen.sum(), chosen.square().sum()])


def whitened(values: torch.Tensor, mask: torch.Tensor, over: torch.Tensor, *, keep_mean: bool = False) -> torch.Tensor:
    """`values` brought to unit variance and, unless the mean is kept, to mean 0; `over` are the moments to go by."""
    count, total, squares = over
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).add(1e-8).sqrt()
    shifted: torch.Tensor = (values - mean) / deviation + (mean if keep_mean else 0)
    return shifted.to(values.dtype) * mask


def leave_one_out(rewards: torch.Tensor, generations: int) -> torch.Tensor:
    """Each answer's reward less the mean reward of the other answers to its prompt (Ahmadian et al. 2024, eq. 8).

    The `generations` answers to a prompt follow each other in `rewards`, shape (answers,).
    """
    groups = rewards.view(-1, generations)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (generations - 1)
    return (groups - others).flatten()


def group_relative(rewards: torch.Tensor, generations: int, *, scale: bool) -> torch.Tensor:
    """Each answer's reward less its group's mean, over the group's standard deviation if `scale`.

    Shao et al. 2024, section 4.1.2; without the scale: Liu et al. 2025. Layout as in `leave_one_out`.
    """
    groups = rewards.view(-1, generations)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if scale:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + 1e-4)
    return advantages.flatten()
