"""Outer step `adagrad`: FedAdagrad (Reddi et al. 2021)."""

from __future__ import annotations

from core_training.parts.outer_steps.outer_step_part import OuterStepPart
from core_training.parts.section import Section

ADAGRAD = OuterStepPart[Section](
    name="adagrad", target="strategies.outer_steps.adagrad:Adagrad", learning_rate=0.1, tau=1e-3
)
