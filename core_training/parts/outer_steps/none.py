"""No outer step: the mean is the next state, or lies on the way to it where a learning rate is given."""

from __future__ import annotations

from core_training.parts.outer_steps.outer_step_part import OuterStepPart
from core_training.parts.section import Section

NONE = OuterStepPart[Section](name="none", target="strategies.outer_steps.plain:Plain")
