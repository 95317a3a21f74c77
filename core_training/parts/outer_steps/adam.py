"""Outer step `adam`: FedAdam (Reddi et al. 2021)."""

from __future__ import annotations

from core_training.parts.outer_steps.outer_step_part import OuterStepPart
from core_training.parts.section import Section

ADAM = OuterStepPart[Section](
    name="adam", target="strategies.outer_steps.adam:Adam", learning_rate=0.01, betas=(0.9, 0.99), tau=1e-3
)
