"""Freeze tuning: some layers are trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from core_training.parts.section import Name, Section
from core_training.parts.tuning_modes.tuning_part import TuningPart


class Freeze(Section):
    """Which layers `freeze` trains; all others stay as they are."""

    trainable_layers: Annotated[int, Field(strict=True)] = Field(
        2, description="The last n layers, or the first n where it is negative."
    )
    trainable_modules: Literal["all"] | list[Name] = Field(
        "all", description="Modules inside those layers, such as `mlp` or `self_attn`."
    )
    extra_modules: list[Name] = Field(
        default_factory=list, description="Modules outside the layers, such as `embed_tokens` or `lm_head`."
    )


def _trains(tuning: Any) -> str:
    settings: Freeze = tuning.settings(FREEZE)
    count, modules = settings.trainable_layers, settings.trainable_modules
    inside = "" if modules == "all" else f" ({', '.join(modules)} in them)"
    outside = "".join(f", {module}" for module in settings.extra_modules)
    return f"the {'first' if count < 0 else 'last'} {abs(count)} layers{inside}{outside}"


FREEZE = TuningPart[Freeze](
    name="freeze",
    target="core_training.tuning.freeze:FreezeTuning",
    settings=Freeze,
    trains=_trains,
    result="layers",
    usual_keys=("trainable_layers",),
)
