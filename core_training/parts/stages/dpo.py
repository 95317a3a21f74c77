"""Direct preference optimisation (Rafailov et al. 2023) and the losses that took its place."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from core_training.parts.data_kinds import PREFERENCE
from core_training.parts.section import Section
from core_training.parts.stages.stage_part import StagePart

LossType = Literal[
    "sigmoid",
    "sigmoid_norm",
    "ipo",
    "hinge",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
]
"""TRL's names; each is a function in `core_training.stages.dpo_losses`."""

_NEED_SMOOTHING = {
    "robust": "the share of pairs that are the wrong way round, such as 0.1",
    "exo_pair": "the paper's ε, such as 1e-3",
}
_TAKE_SMOOTHING = ("sigmoid", *_NEED_SMOOTHING)

_SORTS = "it sorts the ratios of a batch, so the losses of batches and sites would not add up to that of all pairs"
_REFUSED = {
    "aot": _SORTS,
    "aot_unpaired": _SORTS,
    "sft": "it goes beside another loss; set sft_weight",
    "kto_pair": "it is a stage of its own, kto",
}
"""TRL's and LLaMA-Factory's names of losses that are not to be had here, and why."""


class Dpo(Section):
    """Stage `dpo`: direct preference optimisation (Rafailov et al. 2023)."""

    beta: Annotated[float, Field(gt=0)] = Field(0.1, description="Strength of the tie to the reference policy.")
    loss_type: LossType = Field("sigmoid", description="The loss of a pair, by TRL's name (docs/stages.md).")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="The share of pairs taken to be the wrong way round: of `sigmoid`, `robust` and `exo_pair`."
    )
    sft_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Weight of the chosen answer's negative log-likelihood, a mean over its tokens."
    )

    @model_validator(mode="before")
    @classmethod
    def _say_why_not(cls, given: Any) -> Any:
        named = given.get("loss_type") if isinstance(given, dict) else None
        if isinstance(named, str) and named in _REFUSED:
            raise ValueError(f"loss_type: not {named}: {_REFUSED[named]}")
        return given

    @model_validator(mode="after")
    def _check_smoothing(self) -> Self:
        if self.label_smoothing > 0 and self.loss_type not in _TAKE_SMOOTHING:
            raise ValueError(
                f"label_smoothing: loss_type {self.loss_type} has none; leave it out, or choose "
                f"{', '.join(_TAKE_SMOOTHING)}"
            )
        if self.label_smoothing == 0 and (meaning := _NEED_SMOOTHING.get(self.loss_type)) is not None:
            raise ValueError(f"label_smoothing: loss_type {self.loss_type} needs it: {meaning}")
        return self


DPO = StagePart[Dpo](
    name="dpo",
    target="core_training.stages.dpo:Dpo",
    settings=Dpo,
    reads=PREFERENCE,
    unit="pairs",
    learning_rate=5e-7,
    adapter_learning_rate=5e-6,
    refers=True,
    usual_keys=("beta", "loss_type"),
)
