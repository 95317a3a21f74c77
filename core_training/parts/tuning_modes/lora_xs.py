"""LoRA-XS: between two fixed factors a square core is trained (Bałazy et al. 2024); over sites that is Fed-SB."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from core_training.parts.section import Name, PositiveInt, Rank, Section
from core_training.parts.tuning_modes.tuning_part import TuningPart

MOST_R = 64
"""The rank unless a recipe gives one, where the layers have as many components."""


class LoraXs(Section):
    """LoRA-XS (Bałazy et al. 2024): B·R·A, whose A and B stay as they begin, and whose R (r×r) is trained and travels.

    Over sites that is Fed-SB (Singhal et al. 2025): the mean of R is exactly that of the products, and of each layer r²
    values go up and down. `fedloom export` writes a plain LoRA adapter.
    """

    r: Rank | None = Field(
        None,
        description="Rank of the fixed factors, and width and height of the core. Unset: 64, or as many components as "
        "the smallest of the layers has.",
    )
    lora_alpha: PositiveInt | None = Field(
        None, description="Scale: the update is multiplied by lora_alpha / r. Unset: r, which is no scale."
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout before the down-projection.")
    target_modules: Literal["all-linear"] | list[Name] = Field(
        "all-linear", description="Modules that get adapters: `all-linear` (all but the output layer) or names."
    )


def _trains(tuning: Any) -> str:
    settings: LoraXs = tuning.settings(LORA_XS)
    targets, rank = settings.target_modules, settings.r or MOST_R
    where = "the linear layers, without the output layer and experts" if targets == "all-linear" else ", ".join(targets)
    most = "" if settings.r else " (or as large as the smallest layer allows)"
    return f"a core of {rank}×{rank}{most} between two fixed factors a layer, on {where}"


LORA_XS = TuningPart[LoraXs](
    name="lora_xs",
    target="core_training.tuning.lora_xs:LoraXsTuning",
    settings=LoraXs,
    trains=_trains,
    result="adapter",
    is_folded=True,
)
