"""Outer step `momentum`: the heavy ball (Hsu et al. 2019, FedAvgM)."""

from __future__ import annotations

from core_training.parts.outer_steps.outer_step_part import OuterStepPart
from core_training.parts.section import Section

MOMENTUM = OuterStepPart[Section](name="momentum", target="strategies.outer_steps.momentum:Momentum", momentum=0.5)
