"""The section `privacy.differential_privacy` of a recipe.

Of records: DP-SGD (Abadi et al. 2016), by each site in its own steps. Of sites: each clips its update and adds its
share of the noise before the masks, so that the sum that is opened has all of it (Kairouz et al. 2021).
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from core_training.parts.section import Section

EACH_RECORD, EACH_SITE = "record", "site"
"""The unit where each record is one by itself, and that of level `site`."""


class DifferentialPrivacy(Section):
    """How much what leaves a site may tell of one record, document or patient of its. See docs/privacy.md."""

    level: Literal["record", "site"] = Field(
        "record",
        description="`record`: what a site sends tells little of any one unit of its. `site`: the masked sums tell "
        "little of a whole site; it wants hundreds of them (docs/privacy.md).",
    )
    unit: Annotated[str, Field(min_length=1, max_length=200)] = Field(
        EACH_RECORD,
        description="Whose part is hidden: `record`, or a column of the records whose values say whose each one is "
        "(a document, a patient): all records with one value are hidden together.",
    )
    clip: Annotated[float, Field(gt=0, le=1e6)] = Field(
        1.0,
        description="The most that one unit can add to a step's gradient, as L2 norm; it is that of a mean loss. Of "
        "level `site`: the most that a site's update can be in a round.",
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
        description="Whether sites tell their losses and counts of tokens, which no ε covers: for simulations. A real "
        "site refuses it.",
    )

    @model_validator(mode="after")
    def _check_noise(self) -> Self:
        if (self.noise_multiplier is None) == (self.epsilon is None):
            raise ValueError("give either noise_multiplier or epsilon")
        if self.level == "site" and self.unit not in (EACH_RECORD, EACH_SITE):
            raise ValueError("unit: it is the site where level is site; leave it out")
        if self.level == "record" and self.unit == EACH_SITE:
            raise ValueError("unit: whole sites are hidden by level: site; name another column")
        if self.level == "site" and self.tell_losses:
            raise ValueError("tell_losses: where level is site no figures are in the sums; leave it out")
        return self

    @property
    def of_sites(self) -> bool:
        """Whether a whole site is hidden, not a unit of its."""
        return self.level == "site"

    @property
    def hidden(self) -> str:
        """Whose part is hidden: `record`, a column, or `site`."""
        return EACH_SITE if self.of_sites else self.unit
