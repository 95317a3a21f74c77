"""Outer step `nesterov`: Nesterov's momentum (Douillard et al. 2023, DiLoCo)."""

from __future__ import annotations

from core_training.parts.outer_steps.outer_step_part import OuterStepPart
from core_training.parts.section import Section

NESTEROV = OuterStepPart[Section](name="nesterov", target="strategies.outer_steps.nesterov:Nesterov", momentum=0.5)
