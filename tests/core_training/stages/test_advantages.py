"""Advantages against tables worked out by hand and against loops over the definitions; KL estimators and control."""

from __future__ import annotations

import math

import pytest
import torch

from core_training.stages.advantages import (
    generalised_advantages,
    group_relative,
    leave_one_out,
    moments,
    whitened,
)
from core_training.stages.kl import KLController, kl_estimates


def test_generalised_advantages_equal_the_table_worked_out_by_hand() -> None:
    """γ = 0.5, λ = 0.5, so γλ = 0.25. One answer fills the row; the other has two tokens in its middle."""
    rewards = torch.tensor([[1.0, 0.0, 2.0, 4.0], [0.0, 1.0, 3.0, 0.0]])
    values = torch.tensor([[2.0, 1.0, 4.0, 2.0], [9.0, 2.0, 1.0, 9.0]])
    mask = torch.tensor([[True, True, True, True], [False, True, True, False]])
    # δ: 4 − 2 = 2;  2 + ½·2 − 4 = −1;  0 + ½·4 − 1 = 1;  1 + ½·1 − 2 = −½
    # A: 2;  −1 + ¼·2 = −½;  1 − ¼·½ = 0.875;  −½ + ¼·0.875 = −0.28125
    # the other: δ = 3 − 1 = 2;  1 + ½·1 − 2 = −½;  A: 2;  −½ + ¼·2 = 0
    expected = torch.tensor([[-0.28125, 0.875, -0.5, 2.0], [0.0, 0.0, 2.0, 0.0]])
    assert torch.equal(generalised_advantages(rewards, values, mask, 0.5, 0.5), expected)


def test_lambda_1_gives_the_discounted_return_less_the_value_and_lambda_0_the_one_step_error() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(3, 6), torch.randn(3, 6)
    mask = torch.ones(3, 6, dtype=torch.bool)
    returns = torch.stack([sum(0.9**k * rewards[:, t + k] for k in range(6 - t)) for t in range(6)], dim=1)
    torch.testing.assert_close(generalised_advantages(rewards, values, mask, 0.9, 1.0), returns - values)
    one_step = rewards + 0.9 * torch.cat([values[:, 1:], torch.zeros(3, 1)], dim=1) - values
    torch.testing.assert_close(generalised_advantages(rewards, values, mask, 0.9, 0.0), one_step)


def test_whitened_values_have_mean_0_and_variance_1_over_all_batches_together() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(4, 5) * 3 + 7, torch.randn(2, 9) - 2]
    masks = [torch.rand(4, 5) < 0.6, torch.rand(2, 9) < 0.6]
    over = sum(moments(values, mask) for values, mask in zip(batches, masks, strict=True))
    white = [whitened(values, mask, over) for values, mask in zip(batches, masks, strict=True)]
    flat = torch.cat([values[mask] for values, mask in zip(white, masks, strict=True)])
    assert float(flat.mean()) == pytest.approx(0, abs=1e-6)
    assert float(flat.var(correction=0)) == pytest.approx(1, abs=1e-5)
    assert all(not values[~mask].any() for values, mask in zip(white, masks, strict=True))
    kept = torch.cat([whitened(v, m, over, keep_mean=True)[m] for v, m in zip(batches, masks, strict=True)])
    before = torch.cat([values[mask] for values, mask in zip(batches, masks, strict=True)])
    assert float(kept.mean()) == pytest.approx(float(before.mean()), abs=1e-5)


def test_leave_one_out_compares_each_answer_with_the_mean_of_the_others() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    expected = [1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2, 0 - 1.5, 0 - 1.5, 3 - 0]
    assert leave_one_out(rewards, 3).tolist() == expected


def test_group_relative_advantages_are_standard_scores_within_the_group() -> None:
    rewards = torch.tensor([1.0, 3.0, 5.0, 5.0])
    scaled = group_relative(rewards, 2, scale=True)
    assert scaled.tolist() == pytest.approx([-1 / (math.sqrt(2) + 1e-4), 1 / (math.sqrt(2) + 1e-4), 0, 0])
    assert group_relative(rewards, 2, scale=False).tolist() == [-1, 1, 0, 0]


def test_both_estimators_have_the_divergence_as_their_mean_and_k3_is_never_negative() -> None:
    torch.manual_seed(0)
    policy, reference = torch.randn(5).log_softmax(0), torch.randn(5).log_softmax(0)
    divergence = float((policy.exp() * (policy - reference)).sum())
    for estimator in ("k1", "k3"):
        expected = float((policy.exp() * kl_estimates(policy, reference, estimator)).sum())
        assert expected == pytest.approx(divergence, abs=1e-6)
    assert (kl_estimates(policy, reference, "k3") >= 0).all()


@pytest.mark.parametrize("first", [0.001, 10.0])
def test_adaptive_weight_brings_the_divergence_to_its_target(first: float) -> None:
    """A policy whose KL falls as its weight rises, as 1 / coef: the target 2 is held at coef 0.5, from either side."""
    control = KLController(first, target=2.0, horizon=100.0)
    for _ in range(200):
        control.update(1 / control.coef, answers=32)
    assert 1 / control.coef == pytest.approx(2.0, rel=0.01)


def test_one_update_is_the_one_in_the_paper_and_a_fixed_weight_stays() -> None:
    """Ziegler et al. 2019, section 2.2: e = clip(KL/target − 1, ±0.2), β ← β(1 + K·e)."""
    control = KLController(0.1, target=6.0, horizon=1000.0)
    control.update(6.6, answers=50)
    assert control.coef == pytest.approx(0.1 * (1 + 0.1 * 50 / 1000))
    control.update(600.0, answers=50)
    assert control.coef == pytest.approx(0.1 * 1.005 * (1 + 0.2 * 50 / 1000))
    fixed = KLController(0.1)
    fixed.update(600.0, answers=50)
    assert fixed.coef == 0.1
