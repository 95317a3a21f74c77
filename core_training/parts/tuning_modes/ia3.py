"""IA³: the outputs of a few layers are scaled (Liu et al. 2022)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from core_training.parts.section import Name, Section
from core_training.parts.tuning_modes.tuning_part import TuningPart


class Ia3(Section):
    """(IA)³ (Liu et al. 2022): a factor for each key, value and hidden unit; names as in PEFT's `IA3Config`.

    It learns at ten times LoRA's rate and more. A mean of its factors is the factor of the mean: nothing is lost when
    sites average.
    """

    target_modules: list[Name] | None = Field(
        None, description="Modules that are scaled. Unset: what PEFT names for this kind of model."
    )
    feedforward_modules: list[Name] | None = Field(
        None, description="Those of them whose inputs are scaled, not their outputs. Unset: as above."
    )


def _trains(tuning: Any) -> str:
    settings: Ia3 = tuning.settings(IA3)
    return f"factors on {', '.join(settings.target_modules or ['keys', 'values', 'hidden units'])}"


IA3 = TuningPart[Ia3](
    name="ia3",
    target="core_training.tuning.small_adapters:Ia3Tuning",
    settings=Ia3,
    trains=_trains,
    result="adapter",
)
