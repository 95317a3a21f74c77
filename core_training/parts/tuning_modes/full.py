"""Full tuning: every weight is trained."""

from __future__ import annotations

from core_training.parts.section import Section
from core_training.parts.tuning_modes.tuning_part import TuningPart

FULL = TuningPart[Section](
    name="full", target="core_training.tuning.full:Full", trains=lambda _: "every weight", result="model"
)
