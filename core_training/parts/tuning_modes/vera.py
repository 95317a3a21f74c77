"""VeRA: LoRA whose factors are drawn, fixed and shared; two vectors a layer are trained (Kopiczko et al. 2023)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from core_training.parts.section import Name, Rank, Section
from core_training.parts.tuning_modes.tuning_part import TuningPart


class Vera(Section):
    """VeRA (Kopiczko et al. 2023); names and defaults as in PEFT's `VeraConfig`. The factors come from the seed."""

    r: Rank = Field(256, description="Rank of the drawn factors, which cost nothing to send.")
    d_initial: float = Field(0.1, description="What the trained scale of the factors starts at.")
    vera_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout before the down-projection.")
    target_modules: Literal["all-linear"] | list[Name] = Field(
        "all-linear", description="Modules that get adapters: `all-linear` (all but the output layer) or names."
    )


def _trains(tuning: Any) -> str:
    settings: Vera = tuning.settings(VERA)
    targets = settings.target_modules
    where = "the linear layers, without the output layer and experts" if targets == "all-linear" else ", ".join(targets)
    return f"two scales a layer of shared factors of rank {settings.r} on {where}"


VERA = TuningPart[Vera](
    name="vera",
    target="core_training.tuning.small_adapters:VeraTuning",
    settings=Vera,
    trains=_trains,
    result="adapter",
)
