"""A section of the recipe, and the types that its keys share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1)]
ClipRange = Annotated[float, Field(gt=0, le=1e6)]
"""At a million nothing is clipped any more; far above, the limits do not fit in a tensor."""
Passes = Annotated[int, Field(ge=1, le=1000)]
"""What each pass did is remembered for the report of the step."""
Generations = Annotated[int, Field(ge=2, le=1024)]
"""All answers to a prompt are sampled, and in memory, at once."""


class Section(BaseModel):
    """A part of the recipe: unknown keys and wrong types are errors, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
