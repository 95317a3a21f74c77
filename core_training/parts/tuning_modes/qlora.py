"""QLoRA: LoRA beside a base in four bits (Dettmers et al. 2023)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from core_training.parts.section import Section
from core_training.parts.tuning_modes.lora import adapters
from core_training.parts.tuning_modes.tuning_part import TuningPart


class Qlora(Section):
    """How `qlora` holds the base model (Dettmers et al. 2023); the adapters are set under `lora`."""

    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="The four-bit type.")
    double_quant: bool = Field(True, description="Quantise the quantisation constants too.")
    compute_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Type the layers compute in. Unset: `model.dtype`."
    )


def _trains(tuning: Any) -> str:
    held = tuning.settings(QLORA).quant_type
    return f"{adapters(tuning)}, beside a base whose linear layers and experts are held in {held}"


QLORA = TuningPart[Qlora](
    name="qlora",
    target="core_training.tuning.qlora:QloraTuning",
    settings=Qlora,
    trains=_trains,
    result="adapter",
    uses=("lora",),
    unquantised="lora",
)
