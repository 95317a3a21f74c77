"""The facts of a codec, known without loading it."""

from __future__ import annotations

from dataclasses import dataclass

from core_training.parts.registry import Part, S


@dataclass(frozen=True, kw_only=True)
class CodecPart(Part[S]):
    """The facts of a codec: how a trained state is written on its way.

    `target` is a `strategies.codec.StateCodec`, or for a ring `strategies.ring.RingCodec`.
    """

    sends_change: bool = True
    """Whether it writes how far a state moved: then both ends must hold the one that it moved from."""
    ring_bits: int | None = None
    """Bits of the ring in which the numbers of several updates are added up; None where each is read by itself."""
