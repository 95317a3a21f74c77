"""A recipe's keys and what follows from them, such as how many sites a round needs.

Whether they go together, `combinations` says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field

from core_training.parts.aggregation_rules.group_gate import FEWEST_GROUPS, GROUP_GATE
from core_training.parts.stages import STAGES
from core_training.parts.stages.rollout import Rollout
from core_training.parts.stages.stage_part import StagePart
from core_training.parts.tuning_modes import TUNING_MODES
from core_training.parts.tuning_modes.lora import LORA
from core_training.parts.tuning_modes.tuning_part import TuningPart
from core_training.recipe.sections.aggregation import Aggregation
from core_training.recipe.sections.data import Data
from core_training.recipe.sections.deepspeed import DeepSpeed
from core_training.recipe.sections.model import Model
from core_training.recipe.sections.parted import Parted, with_sections
from core_training.recipe.sections.privacy import Privacy
from core_training.recipe.sections.simulation import Simulation
from core_training.recipe.sections.topology import PACES, Topology
from core_training.recipe.sections.training import Training
from core_training.recipe.sections.tuning import Tuning
from core_training.recipe.site_groups import LEAST_MASKED_GROUP, said_of_too_few

if TYPE_CHECKING:
    StageName: TypeAlias = str
else:
    StageName = Literal[tuple(STAGES)]


MOST_VOID_IN_A_ROW = 3
"""Void rounds in a row after which a run ends for now; the same command goes on with it."""


@with_sections(STAGES)
class _WithStages(Parted):
    """The keys that a recipe begins with."""

    model: Model
    stage: StageName
    tuning: Tuning = Field(default_factory=Tuning)
    rollout: Rollout = Field(default_factory=Rollout)


class RecipeKeys(_WithStages):
    """The whole recipe's keys, not held against each other."""

    data: Data = Field(default_factory=Data)
    training: Training = Field(default_factory=Training)
    deepspeed: DeepSpeed = Field(default_factory=DeepSpeed)
    topology: Topology = Field(default_factory=Topology)
    aggregation: Aggregation = Field(default_factory=Aggregation)
    privacy: Privacy = Field(default_factory=Privacy)
    simulation: Simulation = Field(default_factory=Simulation)
    output: Annotated[str, Field(min_length=1)] = Field("runs/latest", description="The run folder.")

    @property
    def stage_part(self) -> StagePart[Any]:
        """The facts of the recipe's stage."""
        return STAGES[self.stage]

    @property
    def stage_settings(self) -> Any:
        """The section of the recipe's stage; None where it has none."""
        return getattr(self, self.stage, None)

    @property
    def tuning_part(self) -> TuningPart[Any]:
        """The facts of the recipe's tuning mode."""
        return TUNING_MODES[self.tuning.mode]

    @property
    def trains_parts(self) -> str | None:
        """The key by which rounds train a part of what is trainable; None where they train all of it."""
        if self.topology.kind == "central":
            return None
        if self.aggregation.adapters != "both":
            return f"aggregation.adapters: {self.aggregation.adapters}"
        if self.tuning_part.has_factors and self.tuning.settings(LORA).site_ranks:
            return "tuning.lora.site_ranks"
        return None

    def alone(self, steps: int, learning_rate: float | None = None) -> Self:
        """The recipe of one site that trains by itself for so many steps; its usual learning rate is that of one."""
        topology = self.topology.model_copy(update={"kind": "central"} | dict.fromkeys(("rounds", *PACES)))
        rate = self.training.learning_rate if learning_rate is None else learning_rate
        training = self.training.model_copy(update={"max_steps": steps, "learning_rate": rate})
        return self.model_copy(update={"topology": topology, "training": training})

    @property
    def judges_by_held_out(self) -> str | None:
        """The key that has a run judged by its held-out loss; None where there is none."""
        keys = {
            "training.load_best_model_at_end": self.training.load_best_model_at_end,
            "topology.early_stopping_patience": self.topology.early_stopping_patience is not None,
            "topology.judged_by": bool(self.topology.judged_by),
            "topology.own_steps": self.topology.own_steps is not None and self.topology.kind != "central",
            f"aggregation.rule: {self.aggregation.rule}": self.tries_groups,
        }
        return next((key for key, judges in keys.items() if judges), None)

    @property
    def usual_learning_rate(self) -> float:
        """The peak learning rate that is usual for the stage and mode; see `core_training.recipe.learning_rate`."""
        part, adapts = self.stage_part, self.tuning_part.result == "adapter"
        return part.adapter_learning_rate if adapts else part.learning_rate

    @property
    def fewest_sites(self) -> dict[str, int]:
        """With how many sites a round can count, by each key that says so: the largest number holds."""
        fewest, secure = {"topology.minimum_sites": self.topology.minimum_sites or 1}, self.privacy.secure
        if secure is not None:
            fewest["privacy.secure_aggregation.minimum_sites"] = secure.minimum_sites
            if isinstance(secure.threshold, int) and self.topology.kind == "federated":
                fewest["privacy.secure_aggregation.threshold"] = secure.threshold
        rule = self.aggregation.rule_part
        if rule.fewest is not None and self.topology.kind == "federated":
            key, of = rule.fewest
            each = self.least_group if rule.in_groups else 1
            fewest[f"aggregation.{rule.name}.{key}"] = of(self.aggregation.settings(rule)) * each
        return fewest

    @property
    def tries_groups(self) -> bool:
        """Whether each round's sites are drawn into groups, whose means are tried by all sites."""
        return self.topology.kind == "federated" and self.aggregation.rule_part.in_groups

    @property
    def least_group(self) -> int:
        """The sites that a group has at least: one, or under masks as many as a sum is opened of, and three."""
        secure = self.privacy.secure
        if secure is None:
            return 1
        opens = secure.threshold if isinstance(secure.threshold, int) else 0
        return max(LEAST_MASKED_GROUP, secure.minimum_sites, opens)

    def groups_among(self, sites: int) -> int:
        """The groups that a round draws so many sites into, none of them too small."""
        return min(self.aggregation.settings(GROUP_GATE).most_groups, sites // self.least_group)

    def too_few_for_groups(self, sites: int) -> str:
        """The reason why so many sites are too few for groups, and what to do; empty where they are not."""
        groups = self.aggregation.settings(GROUP_GATE).groups or FEWEST_GROUPS
        if not self.tries_groups or sites >= groups * self.least_group:
            return ""
        return said_of_too_few(groups, self.least_group, sites)

    @property
    def needed_sites(self) -> int:
        """With how many sites a round can count."""
        return max(self.fewest_sites.values())

    @property
    def most_void_rounds(self) -> int:
        """The void rounds that a run may have beside its `topology.rounds`: as many again, and twice a row of them."""
        return max(self.topology.rounds or 0, 2 * MOST_VOID_IN_A_ROW)

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run at one site; None where a number of epochs decides.

        By `topology.local_seconds` the most of them: its milliseconds.
        """
        in_rounds = (self.topology.rounds or 0) * (self.topology.most_local_steps or 0)
        if self.topology.kind == "central" and self.training.max_steps is not None:
            return self.training.max_steps
        return in_rounds or None
