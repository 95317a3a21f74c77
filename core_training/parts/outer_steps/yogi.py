"""Outer step `yogi`: FedYogi (Reddi et al. 2021)."""

from __future__ import annotations

from core_training.parts.outer_steps.outer_step_part import OuterStepPart
from core_training.parts.section import Section

YOGI = OuterStepPart[Section](
    name="yogi", target="strategies.outer_steps.yogi:Yogi", learning_rate=0.01, betas=(0.9, 0.99), tau=1e-3
)
