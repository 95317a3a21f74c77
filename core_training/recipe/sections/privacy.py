"""The section `privacy`: masks, codecs, differential privacy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from core_training.parts.codecs import CODECS
from core_training.parts.codecs.codec_part import CodecPart
from core_training.parts.section import Section
from core_training.recipe.differential_privacy import DifferentialPrivacy
from core_training.recipe.sections.parted import Parted, with_sections

if TYPE_CHECKING:
    CodecName: TypeAlias = str
else:
    CodecName = Literal[tuple(CODECS)]


class SecureAggregation(Section):
    """How many sites it takes to open a sum, and how the sum is written. See docs/security.md."""

    threshold: Annotated[int, Field(ge=2, le=51)] | Annotated[float, Field(gt=0.5, lt=1)] | None = Field(
        None,
        description=(
            "Sites that it takes to open a sum: a number, or more than this share of them. Unset: more than ⅔, and so "
            "many that a server needs `minimum_sites` − 1 in league with it to read one site's update."
        ),
    )
    minimum_sites: Annotated[int, Field(ge=2, le=51)] = Field(
        3, description="The fewest updates whose sum is ever opened."
    )
    ring_bits: Literal[16, 24, 32] | None = Field(None, description="Bits a value takes on its way. Unset: `codec`'s.")
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="The same as `privacy.clip`."
    )


@with_sections(CODECS)
class Privacy(Parted):
    """What protects the updates on their way, and how they are written.

    `codec` is fp32 unless said, and ring16 (or the ring of `ring_bits`) under secure aggregation.
    """

    secure_aggregation: bool | SecureAggregation = Field(
        False, description="Only the sum of the updates becomes known: true, or how (see below)."
    )
    codec: CodecName | None = Field(
        None,
        description="How updates travel: states in fp32, or changes in bf16 or in a ring of 16, 24 or 32 bits.",
    )
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Rings: the most that one value may change in a round. Unset: from learning rate and steps."
    )
    keep: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="bf16 and rings: the share of the values that travel, drawn anew each round, for all alike.",
    )
    differential_privacy: DifferentialPrivacy | None = Field(
        None, description="What leaves a site tells little of any one record or patient (see below). Unset: off."
    )

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        ring_bits = self.secure.ring_bits if self.secure else None
        codec = self.codec or (f"ring{ring_bits or 16}" if self.secure else "fp32")
        if (
            self.secure
            and isinstance(self.secure.threshold, int)
            and 2 * self.secure.threshold <= self.secure.minimum_sites
        ):
            raise ValueError(
                f"secure_aggregation.threshold: {self.secure.threshold} is never more than half of "
                f"{self.secure.minimum_sites} sites (minimum_sites); give more, or a share above 0.5"
            )
        in_ring = CODECS[codec].ring_bits is not None
        if self.secure and not in_ring:
            raise ValueError(f"codec: secure aggregation needs ring16, ring24 or ring32, not {codec}")
        if ring_bits is not None and codec != f"ring{ring_bits}":
            raise ValueError(f"codec: {codec} and ring_bits {ring_bits} differ; give one of them")
        if self.secure and None not in (self.clip, self.secure.clip) and self.clip != self.secure.clip:
            raise ValueError("clip: it is given twice, and differently")
        clip = self.clip or (self.secure.clip if self.secure else None)
        if clip is not None and not in_ring:
            raise ValueError(f"clip: codec {codec} clips nothing; choose ring16, ring24 or ring32")
        if self.keep < 1 and not CODECS[codec].sends_change:
            raise ValueError(f"keep: codec {codec} sends whole states; choose bf16 or a ring")
        self.__dict__.update(codec=codec, clip=clip)
        return self

    @property
    def hides_units(self) -> bool:
        """Whether each site hides its own records, or whose they are, in every step that it takes."""
        return self.differential_privacy is not None and not self.differential_privacy.of_sites

    @property
    def hides_sites(self) -> bool:
        """Whether whole sites are hidden in the sum of their updates."""
        return self.differential_privacy is not None and self.differential_privacy.of_sites

    @property
    def secure(self) -> SecureAggregation | None:
        """The terms of secure aggregation; None where it is off."""
        if isinstance(self.secure_aggregation, SecureAggregation):
            return self.secure_aggregation
        return SecureAggregation() if self.secure_aggregation else None

    @property
    def codec_part(self) -> CodecPart[Any]:
        """The facts of the codec."""
        assert self.codec is not None, "it is resolved when the recipe is read"
        return CODECS[self.codec]

    @property
    def ring_bits(self) -> int | None:
        """Bits of the ring that updates are written in; None for the other codecs."""
        return self.codec_part.ring_bits
