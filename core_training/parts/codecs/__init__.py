"""The written forms in which trained states travel: whole, or as changes, each by itself or so that they add up."""

from __future__ import annotations

from typing import Any

from core_training.parts.codecs.codec_part import CodecPart
from core_training.parts.registry import Registry
from core_training.parts.section import Section

FP32 = CodecPart[Section](name="fp32", target="strategies.codec:Fp32", sends_change=False)
BF16 = CodecPart[Section](name="bf16", target="strategies.bf16:Bf16")
RINGS = [
    CodecPart[Section](name=f"ring{bits}", target="strategies.ring:RingCodec", ring_bits=bits) for bits in (16, 24, 32)
]

CODECS: Registry[CodecPart[Any]] = Registry(
    CodecPart,
    "fedloom.codecs",
    [FP32, BF16, *RINGS],
    reserved=(
        *("secure_aggregation", "codec", "clip", "keep", "differential_privacy"),
        *("secure", "codec_part", "ring_bits", "hides_sites", "hides_units"),
    ),
)
