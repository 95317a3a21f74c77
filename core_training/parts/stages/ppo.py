"""Proximal policy optimisation (Schulman 2017; Ziegler 2019). One step is one rollout."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from core_training.parts.data_kinds import PROMPT
from core_training.parts.section import ClipRange, Passes, PositiveInt, Section
from core_training.parts.stages.stage_part import StagePart


class Ppo(Section):
    """Stage `ppo`: proximal policy optimisation (Schulman 2017; Ziegler 2019). One step is one rollout."""

    num_ppo_epochs: Passes = Field(4, description="Passes over each rollout.")
    num_mini_batches: PositiveInt = Field(1, description="Optimizer steps in each pass.")
    cliprange: ClipRange = Field(0.2, description="Clipping of the probability ratio.")
    cliprange_value: ClipRange = Field(0.2, description="Clipping of the value's change.")
    vf_coef: Annotated[float, Field(ge=0)] = Field(0.1, description="Weight of the value loss.")
    gamma: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Discount.")
    lam: Annotated[float, Field(ge=0, le=1)] = Field(0.95, description="λ of generalised advantage estimation.")
    whiten_advantages: bool = Field(
        True, description="Bring each rollout's advantages to mean 0 and unit variance, over all processes of a site."
    )
    whiten_rewards: bool = Field(False, description="Bring each rollout's rewards to unit variance.")
    kl_coef: Annotated[float, Field(ge=0)] = Field(0.05, description="Weight of the KL penalty, at the start.")
    kl_estimator: Literal["k1", "k3"] = Field("k1", description="Estimator of the KL divergence (Schulman 2020).")
    kl_target: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Set: adapt the weight so that the KL of an answer stays near this (Ziegler 2019), in nats."
    )
    kl_horizon: Annotated[float, Field(gt=0)] = Field(10_000.0, description="Answers over which the weight adapts.")


PPO = StagePart[Ppo](
    name="ppo",
    target="core_training.stages.ppo:Ppo",
    settings=Ppo,
    reads=PROMPT,
    unit="tokens",
    learning_rate=1e-6,
    adapter_learning_rate=1e-5,
    head="value_head",
    samples=True,
    refers=True,
    passes=lambda ppo: ppo.num_ppo_epochs,
    mini_batches=lambda ppo: ppo.num_mini_batches,
    usual_keys=("num_ppo_epochs", "num_mini_batches", "kl_coef"),
)
