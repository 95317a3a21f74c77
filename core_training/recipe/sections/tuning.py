"""The section `tuning`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from core_training.parts.tuning_modes import NOT_AVERAGED, TUNING_MODES
from core_training.recipe.sections.parted import Parted, with_sections

if TYPE_CHECKING:
    ModeName: TypeAlias = str
else:
    ModeName = Literal[tuple(TUNING_MODES)]


@with_sections(TUNING_MODES)
class Tuning(Parted):
    """Which parameters are trained, and so which ones travel. Reward and value heads always are."""

    mode: ModeName = Field("lora", description=" | ".join(TUNING_MODES) + ".")

    @model_validator(mode="before")
    @classmethod
    def _say_why_not(cls, given: Any) -> Any:
        mode = given.get("mode") if isinstance(given, dict) else None
        if isinstance(mode, str) and mode in NOT_AVERAGED and mode not in TUNING_MODES:
            raise ValueError(f"mode: '{mode}' is not supported: {NOT_AVERAGED[mode]}")
        return given
