"""A section of the recipe, and the types that its keys share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MOST = 10**9
"""The most steps, rows or records that anything is asked for: what counts further would never end."""
MOST_ROUNDS = 10**6 - 1
"""As many rounds as checkpoints have names for."""
PositiveInt = Annotated[int, Field(ge=1, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Rounds = Annotated[int, Field(ge=1, le=MOST_ROUNDS)]
BatchRows = Annotated[int, Field(ge=1, le=65_536)]
"""All rows of a batch are in memory at once."""
Rank = Annotated[int, Field(ge=1, le=65_536)]
"""Wider than any layer; the factors of each are as many values."""
AnswerTokens = Annotated[int, Field(ge=1, le=10**6)]
"""Each token of an answer costs a pass through the model, and room in memory until the answer ends."""
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
