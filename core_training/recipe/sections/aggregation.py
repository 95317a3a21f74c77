"""The section `aggregation`, and the outer step in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from core_training.parts.adapter_sharing import ADAPTER_SHARING, AdapterSharingPart
from core_training.parts.aggregation_rules import AGGREGATION_RULES, AggregationPart
from core_training.parts.mixing_rules import MIXING_RULES, MixingPart
from core_training.parts.outer_steps import OUTER_STEPS
from core_training.parts.outer_steps.outer_step_part import OuterStepPart
from core_training.parts.section import Name
from core_training.recipe.sections.parted import Parted, with_sections

if TYPE_CHECKING:
    RuleName: TypeAlias = str
    MixingName: TypeAlias = str
    StepName: TypeAlias = str
    SharingName: TypeAlias = str
else:
    RuleName = Literal[tuple(AGGREGATION_RULES)]
    MixingName = Literal[tuple(MIXING_RULES)]
    StepName = Literal[tuple(OUTER_STEPS)]
    SharingName = Literal[tuple(ADAPTER_SHARING)]


Beta = Annotated[float, Field(ge=0, lt=1)]


@with_sections(OUTER_STEPS)
class Outer(Parted):
    """A step beyond the mean: the way from a round's start to the mean is taken for a gradient (Reddi et al. 2021).

    A server's, or that of each node of a gossip group. `none` with learning rate 1 takes the mean as it is.
    """

    step: StepName = Field(
        "none",
        description=" | ".join(OUTER_STEPS) + ". What it remembers is committed with each round, and takes as much "
        "memory as one state (`adam`, `yogi`: two). `feddyn` corrects the sites' local steps, too, and needs `sgd`.",
    )
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="η. Unset: 1 for `none`, `momentum` and `nesterov`, 0.1 for `adagrad`, and 0.01 for `adam` and "
        "`yogi`, which move a value by about so much a round.",
    )
    momentum: Beta | None = Field(
        None,
        description="μ of `momentum` and `nesterov`. Unset: 0.5, which a dozen rounds bear; 0.9 wants hundreds.",
    )
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] | None = Field(
        None, description="β₁ and β₂ of `adam` and `yogi`. Unset: 0.9 and 0.99."
    )
    tau: Annotated[float, Field(gt=0)] | None = Field(
        None, description="τ of `adagrad`, `adam` and `yogi`: values that change less are moved less. Unset: 0.001."
    )

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        part = self.step_part
        for key in ("momentum", "betas", "tau"):
            if getattr(self, key) is not None and getattr(part, key) is None:
                raise ValueError(f"{key}: step '{self.step}' has none; leave it out")
        given = {key: getattr(self, key) for key in ("learning_rate", "momentum", "betas", "tau")}
        usual = {key: getattr(part, key) for key, value in given.items() if value is None}
        self.__dict__.update({**usual, "betas": given["betas"] or (list(part.betas) if part.betas else None)})
        return self

    @property
    def step_part(self) -> OuterStepPart[Any]:
        """The facts of the step."""
        return OUTER_STEPS[self.step]

    @property
    def rate(self) -> float:
        """η, resolved."""
        assert self.learning_rate is not None, "it is resolved when the recipe is read"
        return self.learning_rate

    @property
    def used(self) -> bool:
        """Whether the next state is any other than the mean."""
        return self.step != "none" or self.learning_rate != 1


@with_sections(MIXING_RULES)
@with_sections(AGGREGATION_RULES)
class Aggregation(Parted):
    """The arithmetic on the sites' states."""

    rule: RuleName = Field(
        "fedavg",
        description=" | ".join(AGGREGATION_RULES) + ". Federated: `fedavg` is the mean, weighted as `weights` says "
        "(McMahan 2017), and keeps no update. Most others see each update by itself, so not in a ring, under masks or "
        "in gossip, and take the memory of one state for each site: `flower` is any strategy of Flower's, `flexlora` "
        "averages the products of LoRA's factors, `fednova` (which keeps none) each change over its steps, and the "
        "rest bear poisoned sites. `group_gate` bears them with sums over groups alone, so in a ring and under masks, "
        "too.",
    )
    weights: Literal["loss_units", "records", "sqrt_records", "equal", "given"] = Field(
        "loss_units",
        description="What a site's update weighs in a mean: the units that entered its losses in the round (tokens, "
        "pairs or examples, as the stage says), its training records as it announced them or their root, as much as "
        "any other's, or what `site_weights` says. Rings and gossip: not by records. `metropolis` weighs by the graph.",
    )
    site_weights: dict[Name, Annotated[int, Field(ge=1, le=10**6)]] = Field(
        default_factory=dict, description="The weights of `weights: given`, `{SITE: 3}`; others weigh 1."
    )
    mixing: MixingName = Field(
        "group", description="Gossip: weighted mean of all in one group, or Metropolis–Hastings weights on `graph`."
    )
    proximal_mu: Annotated[float, Field(ge=0)] = Field(
        0.0, description="FedProx (Li 2020): μ of the pull of local steps towards the state the round began with."
    )
    scaffold: bool = Field(
        False, description="SCAFFOLD (Karimireddy 2020): local steps go in the direction of all sites. Needs `sgd`."
    )
    adapters: SharingName = Field(
        "both",
        description=" | ".join(ADAPTER_SHARING) + ". LoRA's factors: both train and travel; A stays as it began (FFA-"
        "LoRA, Sun 2024); B and A take turns, round by round (RoLoRA, Chen 2024); A is everybody's and each site keeps "
        "a B of its own, with which it ends (FedSA-LoRA, Guo 2024); B trains and travels, and the server makes A anew "
        "of the singular vectors of B·A (FedSVD, Lee 2025). But for `both`, half the values go up. Federated and, but "
        "for `fedsvd`, gossip.",
    )
    outer: Outer = Field(default_factory=Outer)
    max_update_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None,
        description=(
            "The largest L2 norm of a site's change in a round: a larger one is set aside, with name and figures. "
            "Unset: what no training does (10,000 learning rates a step, root mean square). Not under masks, where "
            "`privacy.clip` bounds each value."
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _say_where_it_is(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("adapters") == "fedsb" and "fedsb" not in ADAPTER_SHARING:
            raise ValueError(
                "adapters: Fed-SB is tuning.mode lora_xs: its cores are all that is trained and travels; set that, and "
                "leave out adapters"
            )
        return given

    @model_validator(mode="after")
    def _check_given(self) -> Self:
        if (self.weights == "given") != bool(self.site_weights):
            raise ValueError("site_weights: they are for weights: given, which needs them; give both or neither")
        return self

    @property
    def corrects(self) -> bool:
        """Whether local steps are corrected."""
        return self.scaffold or self.proximal_mu > 0 or self.counts_rounds

    @property
    def counts_rounds(self) -> bool:
        """Whether what each site remembers of its rounds is a part of what the server remembers of them."""
        return self.outer.step_part.correction is not None

    @property
    def rule_part(self) -> AggregationPart[Any]:
        """The facts of the aggregation rule."""
        return AGGREGATION_RULES[self.rule]

    @property
    def sharing_part(self) -> AdapterSharingPart[Any]:
        """The facts of how adapters are shared."""
        return ADAPTER_SHARING[self.adapters]

    @property
    def mixing_part(self) -> MixingPart[Any]:
        """The facts of the mixing rule."""
        return MIXING_RULES[self.mixing]
