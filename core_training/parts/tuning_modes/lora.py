"""LoRA: low-rank factors beside the weights are trained (Hu et al. 2021)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from core_training.parts.section import Name, PositiveInt, Rank, Section
from core_training.parts.tuning_modes.tuning_part import TuningPart


class Lora(Section):
    """Low-rank adaptation (Hu et al. 2021) of `lora` and `qlora`; names and defaults as in PEFT's `LoraConfig`."""

    r: Rank = Field(8, description="Rank of the update.")
    lora_alpha: PositiveInt = Field(16, description="Scale: the update is multiplied by lora_alpha / r.")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout before the down-projection.")
    target_modules: Literal["all-linear"] | list[Name] = Field(
        "all-linear", description="Modules that get adapters: `all-linear` (all but the output layer) or names."
    )
    experts: bool | None = Field(
        None,
        description="Adapters on the experts of a mixture, which are one tensor to PEFT. Unset: with `all-linear`, "
        "yes, where `lora_dropout`, `use_dora` and `init_lora_weights` do not bar them.",
    )
    use_rslora: bool = Field(False, description="Scale by lora_alpha / √r instead (Kalajdzievski 2023).")
    use_dora: bool = Field(False, description="Train each weight's magnitude apart from its direction (Liu 2024).")
    init_lora_weights: Literal["default", "gaussian", "pissa", "olora"] = Field(
        "default", description="How the factors start: `pissa` and `olora` take them from the base's own weights."
    )
    loraplus_lr_ratio: Annotated[float, Field(gt=0)] | None = Field(
        None, description="LoRA+ (Hayou 2024): the factors B learn at this many times the learning rate, such as 16."
    )
    site_ranks: dict[Name, PositiveInt] = Field(
        default_factory=dict,
        description="Sites that train fewer than r components, `{SITE: 4}`: the first ones, beside all the others, "
        "which they hold. Federated and gossip.",
    )
    modules_to_save: list[Name] = Field(
        default_factory=list, description="Modules trained whole beside the adapters, such as `embed_tokens`."
    )

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        if too_many := [f"{site}: {rank}" for site, rank in self.site_ranks.items() if rank > self.r]:
            raise ValueError(f"site_ranks: {too_many[0]} is more than r: {self.r}, the largest of them")
        return self

    @model_validator(mode="after")
    def _check_experts(self) -> Self:
        if self.experts and (key := self.bars_parameters):
            raise ValueError(f"experts: PEFT has no adapters on experts under {key}; leave out one of them")
        return self

    @property
    def bars_parameters(self) -> str | None:
        """The key under which PEFT has adapters on layers alone, and none on a tensor of experts."""
        barring = {
            "lora_dropout": self.lora_dropout > 0,
            "use_dora": self.use_dora,
            "init_lora_weights": self.carves,
        }
        return next((f"tuning.lora.{key}" for key, bars in barring.items() if bars), None)

    @property
    def carves(self) -> bool:
        """Whether the factors' start is taken out of the base's own weights."""
        return self.init_lora_weights in ("pissa", "olora")


def adapters(tuning: Any) -> str:
    """What is trained, in words."""
    settings: Lora = tuning.settings(LORA)
    beside = "".join(f", {module}" for module in settings.modules_to_save)
    return f"adapters of rank {settings.r} on {_places(settings)}{beside}"


def _places(settings: Lora) -> str:
    if settings.target_modules != "all-linear":
        return ", ".join(settings.target_modules) + (" and a mixture's experts" if settings.experts else "")
    if settings.experts is False or settings.bars_parameters:
        why = "tuning.lora.experts: false" if settings.experts is False else f"{settings.bars_parameters} bars them"
        return f"the linear layers, without the output layer and a mixture's experts ({why})"
    return "the linear layers and a mixture's experts, without the output layer"


LORA = TuningPart[Lora](
    name="lora",
    target="core_training.tuning.lora:LoraTuning",
    settings=Lora,
    trains=adapters,
    result="adapter",
    usual_keys=("r", "lora_alpha", "lora_dropout"),
)
