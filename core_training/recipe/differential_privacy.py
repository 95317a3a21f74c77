"""The section `privacy.differential_privacy` of a recipe.

The mechanism of record level is DP-SGD (Abadi et al. 2016): each step draws every unit by itself, clips what each one
has to say, and adds Gaussian noise.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from core_training.parts.section import Section

EACH_RECORD = "record"
"""The unit where each record is one by itself."""


class DifferentialPrivacy(Section):
    """How much what leaves a site may tell of one record, document or patient of its. See docs/privacy.md."""

    unit: Annotated[str, Field(min_length=1, max_length=200)] = Field(
        EACH_RECORD,
        description="Whose part is hidden: `record`, or a column of the records whose values say whose each one is "
        "(a document, a patient): all records with one value are hidden together.",
    )
    clip: Annotated[float, Field(gt=0, le=1e6)] = Field(
        1.0, description="The most that one unit can add to a step's gradient, as L2 norm. It is that of a mean loss."
    )
    noise_multiplier: Annotated[float, Field(gt=0, le=1e4)] | None = Field(
        None, description="The noise's standard deviation, in clips. Either this or `epsilon`."
    )
    epsilon: Annotated[float, Field(gt=0, le=1e3)] | None = Field(
        None, description="The ε that the whole run may come to at a site, from which the noise follows there."
    )
    delta: Annotated[float, Field(gt=0, lt=0.1)] = Field(
        1e-5, description="The δ that goes with ε. It should be far below one in the number of units."
    )
    tell_losses: bool = Field(
        False,
        description="Whether sites tell their losses and counts of tokens, which no ε covers: for simulations. A site "
        "with a budget refuses it.",
    )

    @model_validator(mode="after")
    def _check_noise(self) -> Self:
        if (self.noise_multiplier is None) == (self.epsilon is None):
            raise ValueError("give either noise_multiplier or epsilon")
        return self
