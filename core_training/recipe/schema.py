"""The recipe: the one YAML file that says what to train, how, and where.

Every key that a recipe may hold has its type, default and meaning here or, where it is a stage's, in its file of
`core_training.parts` (`docs/recipe.md` is made from them).
Paths are relative to the folder the command is run in. How the file is read is in `recipe_file`. No heavy libraries.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias, TypeVar

import yaml
from pydantic import BeforeValidator, Field, create_model, model_validator

from core_training.parts.adapter_sharing import ADAPTER_SHARING, AdapterSharingPart
from core_training.parts.aggregation_rules import AGGREGATION_RULES, AggregationPart
from core_training.parts.aggregation_rules.group_gate import FEWEST_GROUPS, GROUP_GATE
from core_training.parts.codecs import CODECS
from core_training.parts.codecs.codec_part import CodecPart
from core_training.parts.data_kinds import CONVERSATION
from core_training.parts.mixing_rules import MIXING_RULES, MixingPart
from core_training.parts.outer_steps import OUTER_STEPS
from core_training.parts.outer_steps.outer_step_part import OuterStepPart
from core_training.parts.registry import Part, S
from core_training.parts.section import MOST, BatchRows, Count, Name, PositiveInt, Rounds, Section
from core_training.parts.stages import STAGES
from core_training.parts.stages.rollout import Rollout
from core_training.parts.stages.stage_part import StagePart
from core_training.parts.tuning_modes import NOT_AVERAGED, TUNING_MODES
from core_training.parts.tuning_modes.lora import LORA
from core_training.parts.tuning_modes.tuning_part import TuningPart
from core_training.recipe.differential_privacy import DifferentialPrivacy
from core_training.recipe.optimisation import (
    NEEDED_SETTINGS,
    NO_SHARE,
    OPTIMIZERS,
    SCHEDULES,
    UNUSABLE_OPTIMIZERS,
    UNUSABLE_SCHEDULES,
    why_not,
    wrong_argument,
)
from core_training.recipe.site_groups import LEAST_MASKED_GROUP, said_of_too_few

if TYPE_CHECKING:
    StageName: TypeAlias = str
    ModeName: TypeAlias = str
    CodecName: TypeAlias = str
    RuleName: TypeAlias = str
    MixingName: TypeAlias = str
    StepName: TypeAlias = str
    SharingName: TypeAlias = str
else:
    StageName, ModeName = Literal[tuple(STAGES)], Literal[tuple(TUNING_MODES)]
    CodecName, RuleName, MixingName = (Literal[tuple(parts)] for parts in (CODECS, AGGREGATION_RULES, MIXING_RULES))
    StepName, SharingName = Literal[tuple(OUTER_STEPS)], Literal[tuple(ADAPTER_SHARING)]


class Parted(Section):
    """A section with one of its own for each part of a table that has settings."""

    def settings(self, part: Part[S]) -> S:
        """A part's section."""
        section: S = getattr(self, part.name)
        return section

    def sections_of(self, parts: Mapping[str, Part[Any]]) -> list[tuple[str, Section]]:
        """The names and sections of those that have one."""
        return [(part.name, self.settings(part)) for part in parts.values() if part.settings is not None]


P = TypeVar("P", bound=Parted)

MOST_VOID_IN_A_ROW = 3
"""Void rounds in a row after which a run ends for now; the same command goes on with it."""


def with_sections(parts: Mapping[str, Part[Any]]) -> Callable[[type[P]], type[P]]:
    """Add to a class the sections of these parts."""

    def extended(parted: type[P]) -> type[P]:
        sections: dict[str, Any] = {
            part.name: (part.settings, Field(default_factory=part.settings))
            for part in parts.values()
            if part.settings is not None
        }
        return create_model(parted.__name__, __base__=parted, __doc__=parted.__doc__, **sections)

    return extended


class Model(Section):
    """The base model."""

    name_or_path: str = Field(
        description="Folder of the base model (weights, tokenizer, chat template), or its name on the hub, "
        "`OWNER/NAME` or `OWNER/NAME@REVISION`, of which this machine's cache has the files. A run writes down the "
        "commit, and goes on with it. In a real federation: the model's name, which each site maps in `site.yaml`."
    )
    download: bool = Field(
        False,
        description="Fetch a model by its name on the hub, once, where the cache lacks it. A site does so only if its "
        "own `site.yaml` allows it.",
    )
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = Field(
        None,
        description="SHA-256 over the base's weights, as `fedloom model get` prints it; others are refused. A run of a "
        "model by its name on the hub writes it down.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type the frozen weights are held in and the model computes in; trained weights are float32.",
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        Field(None, description="How attention is computed, in transformers' words. Unset: what it chooses itself.")
    )
    router_aux_loss_coef: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="Mixtures of experts, stages pretrain and sft: weight of the loss that keeps the router's choices "
        "in balance (Fedus et al. 2022). 0 leaves it out.",
    )
    chat_template: str | None = Field(
        None,
        description="Chat template to use instead of the model's own: a Jinja file, or the name of a published one "
        "(chatml, llama3, qwen3, gemma3, …: docs/templates.md).",
    )
    add_tokens: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        description="Texts that become tokens of their own: each begins as the mean of all tokens, and its rows are "
        "trained and travel with the rest, beside adapters too. Those like `<|im_start|>` are special: no part of what "
        "a person or a reward function is shown.",
    )
    chat_date: Annotated[str, BeforeValidator(str)] = Field(
        "2025-01-01",
        description="The day that a chat template sees which prints today's date: the same records are the same tokens "
        "on every day.",
    )
    adapters: list[str] = Field(
        default_factory=list,
        description="Run folders whose results the run starts from, in this order: an adapter is merged into the "
        "base, a whole model takes its place. The result is also the reference policy, for the whole run.",
    )

    @model_validator(mode="after")
    def _check_texts(self) -> Self:
        if (self.attn_implementation or "").startswith("flash_") and self.dtype == "float32":
            raise ValueError(f"attn_implementation: {self.attn_implementation} is for 16 bits; set dtype: bfloat16")
        if len(set(self.add_tokens)) < len(self.add_tokens):
            raise ValueError("add_tokens: one of them is given twice")
        try:
            date.fromisoformat(self.chat_date)
        except ValueError:
            raise ValueError(f"chat_date: {self.chat_date!r} is not a day, such as 2025-01-31") from None
        return self


@with_sections(TUNING_MODES)
class Tuning(Parted):
    """Which parameters are trained, and so which ones travel. Reward and value heads always are."""

    mode: ModeName = Field("lora", description=" | ".join(TUNING_MODES) + ".")

    @model_validator(mode="before")
    @classmethod
    def _say_why_not(cls, given: Any) -> Any:
        mode = given.get("mode") if isinstance(given, dict) else None
        if isinstance(mode, str) and mode in NOT_AVERAGED and mode not in TUNING_MODES:
            raise ValueError(f"mode: '{mode}' is not supported: {NOT_AVERAGED[mode]}")
        return given


Reasoning = Literal["keep", "drop", "last"]


class Data(Section):
    """Training and evaluation records."""

    train: str | list[str] | None = Field(
        None,
        description="File, glob, folder, name on the hub that is in this machine's cache, or a list of them: .jsonl "
        ".json .csv .tsv .txt (also .gz), .xlsx .parquet .arrow; `FOLDER/dataset_info.json:NAME` is a data set of "
        "LLaMA-Factory's, `NAME[:1000]` its first thousand records. "
        "In a real federation: the data set's name, which each site maps to files of its own in `site.yaml`.",
    )
    eval: str | list[str] | None = Field(None, description="Evaluation files; without it a part of `train` is kept.")
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="Share of records kept for evaluation, chosen by a stable hash of each record."
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="The stage's column name: the name it has in the files, where they differ."
    )
    on_error: Literal["stop", "skip"] = Field(
        "stop",
        description="A record that does not fit the stage or the model ends the run, or is skipped and counted. A file "
        "that is damaged ends it all the same.",
    )
    unknown: Literal["stop", "warn"] = Field(
        "stop",
        description="What says something in a record and cannot be used (images, a template's settings) ends the run, "
        "or is left out and counted.",
    )
    reasoning: Reasoning = Field(
        "keep",
        description="Thoughts before the assistant's words (`reasoning_content`, `<think>…</think>`): kept, left out, "
        "or kept in the last turn alone, which is what the templates of many thinking models print.",
    )
    max_samples: PositiveInt | None = Field(
        None, description="Records to read of each data set (a file, or all its numbered files), from the first."
    )
    mix: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default_factory=dict,
        description="The share that each source (a file's name without endings) has of the training records: as many "
        "are kept as can be without one twice. Unset: all records.",
    )
    loss_on: Literal["answers", "last_answer", "all"] = Field(
        "answers",
        description="What is learnt of a conversation in stage sft: each of the assistant's turns, the last of them "
        "alone, or all of it, the user's words and the template's too.",
    )
    cache: str | None = Field(
        None,
        description="Folder in which tokenised records are kept, by digest: they are tokenised once, and need not fit "
        "in memory. Unset: in memory, so that no copy of the records is left on disk.",
    )


def _names(given: Any) -> Any:
    """A name, a list of names or nothing, as a list."""
    if given in (None, "none"):
        return []
    return [given] if isinstance(given, str) else given


TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio", "csv"]


class Training(Section):
    """The optimisation; names as in Hugging Face's `TrainingArguments`."""

    learning_rate: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Peak learning rate. Unset: what is usual for the stage and mode, fitted to the model's width and "
        "the number of sites (docs/stages.md).",
    )
    per_device_train_batch_size: BatchRows = Field(8, description="Rows in a batch, on each process.")
    per_device_eval_batch_size: BatchRows = Field(16, description="Rows in an evaluation batch.")
    gradient_accumulation_steps: PositiveInt = Field(1, description="Batches that make one optimizer step.")
    max_length: Annotated[int, Field(ge=2, le=MOST)] = Field(
        512, description="Tokens a row is cut to (cuts are counted)."
    )
    truncation: Literal["keep_start", "keep_end", "leave_out"] | None = Field(
        None,
        description="A longer record keeps its start or its end, or is left out. Unset: a text becomes several rows, a "
        "prompt to be answered keeps its end, all else its start.",
    )
    max_steps: PositiveInt | None = Field(
        None,
        description="Optimizer steps of a central run. Unset: rounds × local_steps (or local_epochs) of the topology, "
        "if it has them.",
    )
    num_train_epochs: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Passes over the data of a central run with neither `max_steps` nor rounds."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        0, description="Seed of initialisation, data order and dropout."
    )
    optim: str = Field("adamw_torch", description=f"Optimizer: {', '.join(f'`{name}`' for name in OPTIMIZERS)}.")
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Adam's and Lion's β₁.")
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = Field(0.999, description="Adam's and Lion's β₂.")
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="Adam's ε.")
    optim_args: str | None = Field(
        None,
        description="What an optimizer reads beside, as `NAME=VALUE` with commas between: of `ademamix`, "
        "`beta3=0.999,alpha=8`.",
    )
    lr_scheduler_type: str = Field(
        "constant_then_linear",
        description="Schedule over the whole run, not over each round: "
        f"{', '.join(f'`{name}`' for name in SCHEDULES)}. `constant_then_linear` falls to 0 over the last 30 % of the "
        "steps (`{decay_ratio: 0.3}`).",
    )
    lr_scheduler_kwargs: dict[str, int | float | str] = Field(
        default_factory=dict, description="What a schedule needs beside, such as `{min_lr_rate: 0.1}`."
    )
    warmup_steps: Count | Annotated[float, Field(gt=0, lt=1)] = Field(
        0, description="Steps over which the learning rate rises from 0; below 1, their share of all steps."
    )
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="The same as a share of all steps, rounded up: what a `warmup_steps` below 1 becomes."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Decoupled weight decay (AdamW).")
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="Gradient clipping; 0 turns it off.")
    packing: bool | None = Field(
        None, description="Put several examples in one row, without cross-talk. Unset: on where stage and model can."
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Trade compute for activation memory: on a CPU, freed memory then goes back to the system, too.",
    )
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Strength of the noise on embedded tokens in training (NEFTune, Jain et al. 2023)."
    )
    torch_compile: bool = Field(
        False, description="Compile the model with `torch.compile`; the first steps are slow. Needs a C++ compiler."
    )
    use_liger_kernel: bool = Field(
        False,
        description="Liger's kernels for norms and MLPs, on a GPU and where they are installed.",
    )
    save_steps: PositiveInt = Field(100, description="Steps between two checkpoints of a central run.")
    eval_steps: PositiveInt | None = Field(
        None,
        description="Steps between two evaluations of a central run. Unset: `eval_every` rounds of the topology, if it "
        "has them, or else of `save_steps`.",
    )
    logging_steps: PositiveInt = Field(
        10, description="Steps between two points of the curve (docs/runs.md); the last step is one, too."
    )
    report_to: Annotated[list[TrackerName], BeforeValidator(_names)] = Field(
        default_factory=list,
        description="Where the curve goes besides `curve.jsonl`, in the run folder: tensorboard, wandb, mlflow, "
        "trackio, csv; one or a list. Nothing leaves the machine unless the library's own variables say so.",
    )
    load_best_model_at_end: bool = Field(
        False,
        description="The result is the state with the lowest held-out loss of those that were evaluated, not the last.",
    )
    keep_optimizer: bool = Field(
        True, description="Optimizer moments stay at a site from round to round; false: each round starts without."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_shares(cls, given: Any) -> Any:
        for key in ("save_steps", "eval_steps", "logging_steps") if isinstance(given, dict) else ():
            if isinstance(steps := given.get(key), float) and 0 < steps < 1:
                raise ValueError(f"{key}: {NO_SHARE}, not {steps}")
        return given

    @model_validator(mode="after")
    def _check_optimisation(self) -> Self:
        for key, usable, unusable in (
            ("optim", OPTIMIZERS, UNUSABLE_OPTIMIZERS),
            ("lr_scheduler_type", SCHEDULES, UNUSABLE_SCHEDULES),
        ):
            if reason := why_not(getattr(self, key), usable, unusable):
                raise ValueError(f"{key}: {reason}")
        if self.optim_args is not None and (wrong := wrong_argument(self.optim, self.optim_args)):
            raise ValueError(f"optim_args: {wrong}")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("warmup_ratio: warmup_steps says the same; give one of them")
        if isinstance(self.warmup_steps, float):
            self.__dict__.update(warmup_ratio=self.warmup_steps, warmup_steps=0)
        schedule, needed = self.lr_scheduler_type, NEEDED_SETTINGS.get(self.lr_scheduler_type, ())
        if self.lr_scheduler_kwargs and schedule in ("constant", "constant_with_warmup"):
            raise ValueError(f"lr_scheduler_kwargs: schedule {schedule} has no settings; leave it out")
        if needed and not set(needed) & set(self.lr_scheduler_kwargs):
            raise ValueError(f"lr_scheduler_kwargs: schedule {schedule} needs {' or '.join(needed)}")
        return self

    def warmup_of(self, total_steps: int) -> int:
        """The steps of warm-up in a run of so many steps."""
        return int(self.warmup_steps) or math.ceil(total_steps * self.warmup_ratio)


class DeepSpeed(Section):
    """A DeepSpeed group: ZeRO data parallelism over its processes, on one machine or several.

    One process trains without DeepSpeed, unless another key says otherwise.
    """

    processes: PositiveInt = Field(1, description="Processes of the group, on all its machines.")
    stage: Literal[0, 1, 2, 3] = Field(0, description="ZeRO stage; in bfloat16, 0 runs as 1.")
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="What moves to CPU memory: nothing, the optimizer, or (ZeRO 3) the parameters too."
    )
    config: str | None = Field(None, description="A DeepSpeed JSON file, used instead of the keys above.")

    def check(self) -> None:
        """Raise ValueError for what DeepSpeed does not do, or would not be asked to."""
        if self.offload == "all" and self.stage != 3:
            raise ValueError("deepspeed.offload: 'all' needs deepspeed.stage 3; ZeRO 1 and 2 offload the 'optimizer'")
        if self.offload == "optimizer" and self.stage == 0:
            raise ValueError("deepspeed.offload: ZeRO 0 moves nothing; 'optimizer' needs deepspeed.stage 1, 2 or 3")

    @property
    def used(self) -> bool:
        """Whether DeepSpeed is: for several processes, or for what its stages and offloading do for one."""
        return self != DeepSpeed()


_FEW_LOCAL_STEPS = 5
PACES = ("local_steps", "local_epochs", "local_seconds")
"""The keys that say how far a site goes in a round."""
MOST_SECONDS = 10**5
"""Of a round: more than a day."""
_BY_NUMBERS_OF_STEPS = ("inverse_sqrt", "warmup_stable_decay")
"""The schedules that go by a number of steps, not by the share of the run that is over."""


class Topology(Section):
    """Who trains, and how the results meet."""

    kind: Literal["central", "federated", "gossip"] = Field("central", description="central | federated | gossip.")
    rounds: Rounds | None = Field(None, description="Exchanges.")
    local_steps: PositiveInt | None = Field(
        None,
        description="Optimizer steps at each site between two exchanges. Unset: 5 where there are rounds; few keep the "
        "sites together (docs/results.md).",
    )
    local_epochs: Annotated[float, Field(gt=0, le=1000)] | None = Field(
        None,
        description="In place of `local_steps`: passes of each site over its own records between two exchanges, such "
        "as 0.2; rounded up to steps, one or more. A larger site takes more of them.",
    )
    local_seconds: Annotated[float, Field(gt=0, le=MOST_SECONDS)] | None = Field(
        None,
        description="In place of `local_steps`: seconds that each site trains between two exchanges, for one step or "
        "more. A faster site takes more of them, and no second run is the same.",
    )
    minimum_sites: PositiveInt | None = Field(
        None, description="Sites that must answer for a round to count. Unset: 1; among several gossip nodes 2."
    )
    sites: PositiveInt | None = Field(
        None,
        description="Sites that are expected to take part: a learning rate that is not given goes with their number "
        "(docs/stages.md). Unset: those admitted when the run is submitted, in the roster, or simulated.",
    )
    sites_per_round: PositiveInt | Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Federated: sites that take part in a round, a number or a share of those that are there, drawn "
        "anew each round from `training.seed` and the names. Unset: all.",
    )
    asked_beyond: Annotated[float, Field(ge=0, le=10)] = Field(
        0.0,
        description="The share of sites that are asked beyond `sites_per_round`: a round goes on as soon as so many "
        "have answered, without the slowest. Not under masks.",
    )
    buffer: PositiveInt | None = Field(
        None,
        description="Federated, asynchronous (FedBuff, Nguyen 2022): a round is of the first so many updates, and who "
        "has not answered works on from the state that it was given. A site is asked anew once it has answered and a "
        "round is over, so a fast one takes part more often. In a ring, masked or not, so many sites begin together, "
        "and a round is of the first such cohort's sum. Unset: a round waits for all that it asked.",
    )
    most_stale: Annotated[int, Field(ge=0, le=1000)] = Field(
        10,
        description="Of `buffer`: the most rounds that may have passed since an update's start; an older one is left "
        "out, with an event. The states of so many rounds stay on the server's disk.",
    )
    stale_power: Annotated[float, Field(ge=0, le=10)] = Field(
        0.5,
        description="Of `buffer`: an update that began s rounds ago counts (1 + s)^−p, and this is p; 0: all alike.",
    )
    round_deadline: Annotated[float, Field(gt=0)] = Field(
        3600.0, description="Seconds after which a round goes on without the sites that have not answered."
    )
    keep_rounds: Annotated[int, Field(ge=2)] = Field(
        2, description="A server's last committed rounds, to which `fedloom server rewind` can take the run back."
    )
    own_steps: PositiveInt | None = Field(
        None,
        description="Federated and gossip: steps that each site trains the finished model on, on its own records, in "
        "at most half of `round_deadline`, from where it is best there on the way from the run's start to it. The best "
        "that it comes to is its own model (`own/` in its run folder) where it is better on the site's held-out "
        "records than the common one, and never leaves it. Unset: none.",
    )
    own_learning_rate: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="The peak learning rate of `own_steps`. Unset: a quarter of `training.learning_rate` or, where "
        "that is unset too, of what one site by itself would get.",
    )
    own_proximal_mu: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="Ditto (Li 2021): μ of the pull of `own_steps` towards the state that they begin with, the common "
        "one unless another is better at the site.",
    )
    eval_every: PositiveInt = Field(1, description="Rounds between two evaluations on the sites' held-out records.")
    judged_by: list[Name] = Field(
        default_factory=list,
        description="Federated: the sites on whose held-out records the state is evaluated after each round, which "
        "early stopping and the best state go by; say, those that hold a common test set (`data.eval`). The result is "
        "evaluated by all. Unset: all.",
    )
    early_stopping_patience: PositiveInt | None = Field(
        None, description="Stop after this many evaluations without a lower held-out loss."
    )
    graph: Literal["complete", "ring", "exponential", "one_peer"] = Field(
        "complete",
        description="Who talks to whom under `mixing: metropolis`: all, the two beside one in the roster, or those 1, "
        "2, 4, 8, … places away, about 2·log₂ n of n nodes; `one_peer`: one of log₂ n in turn, another in each round.",
    )

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        given = [key for key in PACES if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[1]}: how far a round goes is said by {given[0]} already; give one of them")
        if self.rounds is not None and not given:
            self.__dict__.update(local_steps=_FEW_LOCAL_STEPS)
        if self.local_seconds is not None and self.local_seconds >= self.round_deadline:
            raise ValueError(
                f"local_seconds: a site that trains for {self.local_seconds:g} s has not answered by round_deadline, "
                f"{self.round_deadline:g} s; give fewer"
            )
        for key in ("own_learning_rate", "own_proximal_mu"):
            if getattr(self, key) and self.own_steps is None:
                raise ValueError(f"{key}: it is of the steps after the run, and there are none; give own_steps too")
        if self.asked_beyond and self.sites_per_round is None:
            raise ValueError("asked_beyond: a round that takes all sites has none beyond; give sites_per_round too")
        if self.buffer is not None and self.sites_per_round is not None:
            raise ValueError(
                "buffer: all sites work, and a round takes the first that answer; leave out it or sites_per_round"
            )
        return self

    @property
    def most_local_steps(self) -> int | None:
        """The steps of a round at each site, at most; None where they follow from a site's records (`local_epochs`).

        By `local_seconds` its milliseconds: the learning rate goes by them, and no step is taken in less.
        """
        return self.local_steps if self.local_seconds is None else math.ceil(1000 * self.local_seconds)

    @property
    def own_pace(self) -> str | None:
        """The key by which each site takes a number of steps of its own in a round; None where all take as many."""
        given = {"topology.local_epochs": self.local_epochs, "topology.local_seconds": self.local_seconds}
        return next((key for key, value in given.items() if value is not None), None)

    def in_round(self, sites: int) -> int:
        """How many of so many sites a round is of."""
        wanted = self.buffer if self.sites_per_round is None else self.sites_per_round
        if wanted is None:
            return sites
        return min(sites, wanted if isinstance(wanted, int) else math.ceil(wanted * sites))

    def judges(self, site: str) -> bool:
        """Whether a site evaluates the state after each round."""
        return not self.judged_by or site in self.judged_by

    @property
    def fewest_sites(self) -> int:
        """`minimum_sites`, or what stands for it where it is unset and there are as many."""
        return self.minimum_sites or (2 if self.kind == "gossip" else 1)


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


class Simulation(Section):
    """The sites of `fedloom simulate`: given one by one, or made by partition of `data.train`."""

    sites: list[str] | dict[str, str] | None = Field(
        None, description="A file for each site (its name is the file's), or `name: file`."
    )
    partition: Literal["iid", "dirichlet", "size_skew", "natural"] | None = Field(
        None, description="How `data.train` is divided: evenly, by label skew, by size skew, or by a column's values."
    )
    count: PositiveInt | None = Field(None, description="Sites to make (not for `natural`).")
    by: str | None = Field(None, description="The column of `dirichlet` and `natural`.")
    alpha: Annotated[float, Field(gt=0)] = Field(0.5, description="Dirichlet concentration: smaller is more uneven.")
    engine: Literal["inprocess", "ray"] = Field("inprocess", description="inprocess | ray (extra `simulation`).")


@with_sections(STAGES)
class _WithStages(Parted):
    """The keys that a recipe begins with."""

    model: Model
    stage: StageName
    tuning: Tuning = Field(default_factory=Tuning)
    rollout: Rollout = Field(default_factory=Rollout)


class Recipe(_WithStages):
    """The whole recipe."""

    data: Data = Field(default_factory=Data)
    training: Training = Field(default_factory=Training)
    deepspeed: DeepSpeed = Field(default_factory=DeepSpeed)
    topology: Topology = Field(default_factory=Topology)
    aggregation: Aggregation = Field(default_factory=Aggregation)
    privacy: Privacy = Field(default_factory=Privacy)
    simulation: Simulation = Field(default_factory=Simulation)
    output: Annotated[str, Field(min_length=1)] = Field("runs/latest", description="The run folder.")

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        self._check_stage()
        if self.privacy.differential_privacy is not None:
            self._check_differential_privacy()
        if self.topology.own_pace is not None:
            self._check_pace(self.topology.own_pace)
        if self.topology.kind != "central":
            if self.topology.rounds is None:
                raise ValueError(f"topology.rounds: a {self.topology.kind} run needs it, a whole number from 1 up")
            if self.aggregation.corrects:
                self._check_correction()
            if self.aggregation.outer.used:
                self._check_outer_step()
            self._check_rule()
            if self.topology.own_steps is not None and self.deepspeed.used:
                raise ValueError("topology.own_steps: a DeepSpeed group trains one state; leave out deepspeed")
            if self.topology.graph == "one_peer" and self.topology.early_stopping_patience is not None:
                raise ValueError(
                    "topology.early_stopping_patience: a node of graph one_peer hears one other in a round, and cannot "
                    "agree with all when to stop; choose graph exponential, or leave it out"
                )
            if self.topology.judged_by and self.topology.kind == "gossip":
                raise ValueError(
                    "topology.judged_by: gossip nodes agree on when to stop by what each of them sees; leave it out"
                )
            if self.topology.sites_per_round is not None:
                self._check_participation(self.topology.sites_per_round)
            if self.topology.buffer is not None:
                self._check_buffer(self.topology.buffer)
            if self.trains_parts is not None:
                self._check_parts(self.trains_parts)
            if self.aggregation.weights in ("records", "sqrt_records"):
                self._check_weights()
            self._check_privacy()
        if self.judges_by_held_out is not None and self.data.eval is None and self.data.eval_fraction == 0:
            key = self.judges_by_held_out
            raise ValueError(f"{key}: no records are held out to judge by; give data.eval or data.eval_fraction")
        self.deepspeed.check()
        if self.simulation.sites is not None and not self.simulation.sites:
            raise ValueError("simulation.sites: name at least one site's file")
        if self.simulation.sites is not None and self.simulation.partition is not None:
            raise ValueError("simulation: give either 'sites' or 'partition', not both")
        if self.simulation.partition in ("iid", "dirichlet", "size_skew") and self.simulation.count is None:
            raise ValueError(f"simulation.count: partition '{self.simulation.partition}' needs the number of sites")
        if self.simulation.partition in ("dirichlet", "natural") and self.simulation.by is None:
            raise ValueError(f"simulation.by: partition '{self.simulation.partition}' needs a column to divide by")
        return self

    def _check_stage(self) -> None:
        part = self.stage_part
        judges = [name for name in ("reward_model", "reward_function") if getattr(self.rollout, name) is not None]
        if part.samples and len(judges) != 1:
            raise ValueError(
                f"rollout: stage {self.stage} needs something that judges answers; give either reward_model (the run "
                "folder of a run of stage reward) or reward_function (FILE.py:name)"
            )
        if part.rows_compared is not None and self.training.per_device_train_batch_size < 2:
            raise ValueError(
                f"training.per_device_train_batch_size: stage {self.stage} {part.rows_compared}; give 2 or more"
            )
        if self.model.router_aux_loss_coef and not part.packs:
            raise ValueError(
                f"model.router_aux_loss_coef: it is for the stages pretrain and sft, not for stage {self.stage}"
            )
        if self.training.neftune_noise_alpha and part.samples:
            raise ValueError(
                f"training.neftune_noise_alpha: stage {self.stage} compares the policy with what it was without noise; "
                "leave it out"
            )
        if self.data.loss_on != "answers" and part.reads is not CONVERSATION:
            raise ValueError(f"data.loss_on: it is for conversations, as of stage sft, not for stage {self.stage}")
        if self.training.packing and not part.packs:
            raise ValueError(f"training.packing: examples of stage {self.stage} cannot share a row; leave it out")

    def _check_differential_privacy(self) -> None:
        if "weights" not in self.aggregation.model_fields_set:
            # The weight that is usual would tell how many tokens were drawn.
            self.__dict__.update(aggregation=self.aggregation.model_copy(update={"weights": "equal"}))
        for wrong, key, why in _undoing_privacy(self):
            if wrong:
                raise ValueError(f"{key}: under privacy.differential_privacy {why}")

    def _check_privacy(self) -> None:
        privacy, aggregation = self.privacy, self.aggregation
        in_gossip, in_ring = self.topology.kind == "gossip", privacy.ring_bits is not None
        if in_gossip and in_ring and not aggregation.mixing_part.is_weighted_mean:
            raise ValueError(
                f"privacy.codec: {privacy.codec} carries sums, and mixing '{aggregation.mixing}' needs each "
                "neighbour's state by itself; choose mixing 'group', or codec fp32 or bf16 without secure aggregation"
            )
        if in_gossip and (aggregation.rule_part.needs_each_update or aggregation.rule_part.in_groups):
            raise ValueError(
                f"aggregation.rule: '{aggregation.rule}' is a server's, and gossip nodes average by "
                "aggregation.mixing, which no rule guards; choose rule 'fedavg', or topology.kind 'federated'"
            )
        sums_do = aggregation.rule_part.is_weighted_mean or aggregation.rule_part.in_groups
        if not in_gossip and in_ring and not sums_do:
            raise ValueError(
                f"privacy.codec: {privacy.codec} carries sums, and rule '{aggregation.rule}' needs each site's "
                "state by itself; choose rule 'fedavg', or codec fp32 or bf16 without secure aggregation"
            )
        if privacy.secure and (key := self._opens_one_sites_part):
            raise ValueError(
                f"{key}: with it the sum of the updates could tell one site's part, which nobody is to know under "
                "privacy.secure_aggregation; leave out one of them"
            )
        if aggregation.max_update_norm is not None and in_ring and (in_gossip or privacy.secure):
            raise ValueError(
                "aggregation.max_update_norm: nobody sees a single update of this run, whose sums alone are known; set "
                "privacy.clip, the most that one value may change"
            )
        if privacy.keep < 1 and aggregation.scaffold:
            raise ValueError(
                "privacy.keep: SCAFFOLD takes how far the mean moved, so all of it has to travel; leave it out"
            )
        if privacy.keep < 1 and in_gossip and not in_ring:
            raise ValueError(
                f"privacy.keep: gossip nodes send {privacy.codec} changes since the start of the run; choose a "
                "ring codec"
            )

    @property
    def _opens_one_sites_part(self) -> str | None:
        """The key that singles out sites by name, in what they add to a sum; None where there is none."""
        if self.topology.judged_by:
            return "topology.judged_by"
        if self.aggregation.weights == "given":
            return "aggregation.site_weights"
        return "tuning.lora.site_ranks" if self.tuning.settings(LORA).site_ranks and self.trains_parts else None

    def _check_weights(self) -> None:
        key, instead = f"aggregation.weights: {self.aggregation.weights}", "choose loss_units, equal or given"
        if self.topology.kind == "gossip":
            raise ValueError(f"{key} is more than a gossip node knows of its peers, so they could claim any; {instead}")
        if self.privacy.ring_bits is not None:
            raise ValueError(
                f"{key} has no most that the recipe knows, and {self.privacy.codec} is written on a scale that has to; "
                f"{instead}, or codec fp32 or bf16 without secure aggregation"
            )

    def _check_correction(self) -> None:
        key = "aggregation.scaffold" if self.aggregation.scaffold else "aggregation.proximal_mu"
        if self.aggregation.counts_rounds:
            key = f"aggregation.outer.step: {self.aggregation.outer.step}"
        if self.deepspeed.used:
            raise ValueError(f"{key}: it changes gradients that DeepSpeed keeps to itself; leave out deepspeed")
        if self.aggregation.counts_rounds:
            self._check_counted_rounds(key)
            return
        if not self.aggregation.scaffold:
            return
        if self.aggregation.proximal_mu > 0:
            raise ValueError("aggregation: give either 'proximal_mu' or 'scaffold', not both")
        if self.training.optim != "sgd":
            raise ValueError(
                f"{key}: it takes how far a site moved for its gradient, which holds for training.optim 'sgd' only, "
                f"not '{self.training.optim}'"
            )
        if self.topology.kind == "gossip" and not self.aggregation.mixing_part.is_weighted_mean:
            raise ValueError(f"{key}: it needs one mean of all sites, aggregation.mixing 'group'")
        if self.topology.kind == "federated" and not self.aggregation.rule_part.is_weighted_mean:
            raise ValueError(f"{key}: it needs the mean of all sites, aggregation.rule 'fedavg'")

    def _check_counted_rounds(self, key: str) -> None:
        """Refuse what would part the sum of the sites' changes at the server from what each of them remembers."""
        aggregation, training = self.aggregation, self.training
        if self.topology.kind == "gossip":
            raise ValueError(
                f"{key}: one server keeps the sum of all sites' changes, and tells each which of its own counted; "
                "choose aggregation.scaffold, step nesterov (in a ring), or topology.kind 'federated'"
            )
        if aggregation.scaffold or aggregation.proximal_mu > 0:
            raise ValueError(f"{key}: it corrects local steps itself; leave out aggregation.scaffold and proximal_mu")
        if training.optim != "sgd" or training.optim_args:
            raise ValueError(
                f"{key}: it takes how far a site moved for its gradient, which holds for plain SGD alone; choose "
                "training.optim sgd without optim_args, or step nesterov"
            )
        if not aggregation.rule_part.is_weighted_mean:
            raise ValueError(f"{key}: it needs the mean of all sites, aggregation.rule 'fedavg'")
        if "weights" not in aggregation.model_fields_set:
            self.__dict__.update(aggregation=aggregation.model_copy(update={"weights": "equal"}))
        elif aggregation.weights != "equal":
            raise ValueError(
                f"aggregation.weights: {aggregation.weights}: under {key} each site counts as one; choose equal"
            )
        if aggregation.outer.learning_rate != 1:
            raise ValueError(
                f"aggregation.outer.learning_rate: {key} goes as far as the sites' changes say; leave it out, and set "
                "aggregation.outer.feddyn.alpha"
            )
        if self.privacy.keep < 1:
            raise ValueError(f"privacy.keep: under {key} all of a change has to travel; leave it out")
        if (dp := self.privacy.differential_privacy) is not None and dp.level == "site":
            raise ValueError(
                f"{key}: under differential privacy of level site what the server gets is not what a site remembers "
                "of it; choose step nesterov, or level record"
            )

    def _check_pace(self, key: str) -> None:
        """Refuse what needs every site to take as many steps in a round, and all to know how many."""
        by_time = self.topology.local_seconds is not None
        if self.topology.kind == "central":
            if by_time and self.training.max_steps is None:
                raise ValueError(f"{key}: a central run has no rounds that time could end; give training.max_steps")
            return
        if by_time and self.deepspeed.used:
            raise ValueError(f"{key}: the processes of a DeepSpeed group have a clock each; leave out deepspeed")
        if self.topology.kind == "gossip" and not by_time:
            raise ValueError(
                f"{key}: gossip nodes do not know each other's records, and so not how much one can have learnt from; "
                "give local_steps or local_seconds"
            )
        if self.privacy.ring_bits is not None:
            raise ValueError(
                f"{key}: {self.privacy.codec} is written on a scale that follows from the steps between two exchanges, "
                "which all have to know; give local_steps, or codec fp32 or bf16 without secure aggregation"
            )
        if self.aggregation.scaffold:
            raise ValueError(f"{key}: SCAFFOLD takes all sites to have gone as many steps; give local_steps")
        if self.training.warmup_steps:
            raise ValueError(
                f"training.warmup_steps: by {key} no two sites take as many steps; give a share of them, below 1"
            )
        if (schedule := self.training.lr_scheduler_type) in _BY_NUMBERS_OF_STEPS:
            raise ValueError(
                f"training.lr_scheduler_type: {schedule} goes by a number of steps, and by {key} no two sites take as "
                "many; choose constant_then_linear, linear or cosine"
            )

    def _check_participation(self, sites: float) -> None:
        if self.topology.kind == "gossip":
            raise ValueError(
                "topology.sites_per_round: it is a server that draws the sites of a round; leave it out, or choose "
                "topology.graph ring or exponential, in which a node talks to few"
            )
        if isinstance(sites, int) and sites < self.needed_sites:
            key = max(self.fewest_sites, key=lambda key: self.fewest_sites[key])
            raise ValueError(f"topology.sites_per_round: {sites} is less than {key}, {self.needed_sites}")
        if self.topology.judged_by:
            raise ValueError(
                "topology.judged_by: a round of drawn sites may have none of those who judge; leave out one of them"
            )
        if self.topology.asked_beyond and self.privacy.secure is not None:
            raise ValueError(
                "topology.asked_beyond: under masks whoever is asked has to be waited for, or its masks to be taken "
                "out; leave it out"
            )

    def _check_buffer(self, updates: int) -> None:
        """Refuse what does not go together with updates that began from different states."""
        key, synchronous = "topology.buffer", "leave it out, or choose topology.sites_per_round"
        if self.topology.kind == "gossip":
            raise ValueError(f"{key}: it is a server that gathers updates; leave it out")
        if updates < self.needed_sites:
            most = max(self.fewest_sites, key=lambda name: self.fewest_sites[name])
            raise ValueError(f"{key}: {updates} is less than {most}, {self.needed_sites}")
        if self.privacy.hides_sites:
            raise ValueError(
                f"{key}: nobody could say beforehand how often a site takes part, and so what its privacy comes to; "
                f"{synchronous}"
            )
        if self.aggregation.scaffold or self.aggregation.counts_rounds:
            name = "SCAFFOLD" if self.aggregation.scaffold else "FedDyn"
            raise ValueError(f"{key}: {name} takes all sites to step from one state; {synchronous}")
        rule, sharing = self.aggregation.rule_part, self.aggregation.sharing_part
        if rule.needs_rank or sharing.remade_by is not None:
            name = f"rule '{rule.name}'" if rule.needs_rank else f"adapters '{sharing.name}'"
            raise ValueError(
                f"{key}: {name} makes factors anew in each round, and a change of older ones does not fit them; "
                f"{synchronous}"
            )
        if rule.in_groups or rule.needs_steps or rule.remembers:
            raise ValueError(
                f"{key}: rule '{rule.name}' goes by changes from one state; {synchronous}, or rule 'fedavg'"
            )
        if self.topology.judged_by:
            raise ValueError(f"topology.judged_by: a buffer may have none of those who judge; {synchronous}")

    def _check_parts(self, key: str) -> None:
        if not self.tuning_part.has_factors:
            raise ValueError(
                f"{key}: it is for the factors of LoRA, and tuning.mode is '{self.tuning.mode}'; choose lora or qlora"
            )
        if self.deepspeed.used:
            raise ValueError(f"{key}: it leaves parameters alone that DeepSpeed keeps to itself; leave out deepspeed")
        if self.aggregation.corrects:
            raise ValueError(f"{key}: proximal_mu, scaffold and feddyn move all that is trained; leave out one of them")
        if self.aggregation.sharing_part.keeps_own and self.training.load_best_model_at_end:
            raise ValueError(
                f"{key}: a site cannot take its own factor back to the round that was best; leave out "
                "training.load_best_model_at_end"
            )
        if self.aggregation.sharing_part.remade_by is not None:
            self._check_remade(key)
        if self.aggregation.sharing_part.leaves_alone and self.aggregation.outer.step != "none":
            raise ValueError(
                f"{key}: what aggregation.outer remembers moves a factor in the rounds that leave it alone; choose "
                "step none, or adapters both or ffa"
            )

    def _check_remade(self, key: str) -> None:
        """Refuse what goes by factors of the round before; a site's moments of them are let go."""
        if self.topology.kind == "gossip":
            raise ValueError(
                f"{key}: one server makes the factors anew, and gossip nodes on unlike machines would come to unlike "
                "bits; choose ffa or rolora, or topology.kind 'federated'"
            )
        if self.aggregation.outer.step != "none":
            raise ValueError(
                f"{key}: what aggregation.outer remembers is of the factors before they were made anew; choose step "
                "none, or adapters both or ffa"
            )
        if self.aggregation.rule_part.remembers:
            raise ValueError(
                f"{key}: what rule '{self.aggregation.rule}' remembers is of the factors before they were made anew; "
                "choose rule 'fedavg', or adapters both or ffa"
            )
        if "keep_optimizer" not in self.training.model_fields_set:
            self.__dict__.update(training=self.training.model_copy(update={"keep_optimizer": False}))
        elif self.training.keep_optimizer:
            raise ValueError(
                f"{key}: the optimizer's moments are of the factors before they were made anew; set "
                "training.keep_optimizer to false, or leave it out"
            )

    def _check_rule(self) -> None:
        rule = self.aggregation.rule_part
        if rule.in_groups and self.topology.kind == "federated":
            self._check_groups(rule)
        for key in rule.required:
            if getattr(self.aggregation.settings(rule), key) is None:
                raise ValueError(f"aggregation.{rule.name}.{key}: rule '{rule.name}' needs it")
        if rule.needs_rank:
            self._check_factors(f"aggregation.rule: '{rule.name}'")
        if rule.needs_steps:
            self._check_counted_steps(f"aggregation.rule: '{rule.name}'")
        if not rule.remembers:
            return
        if self.aggregation.outer.used:
            raise ValueError(
                f"aggregation.outer: rule '{rule.name}' takes steps of its own, and remembers what they need; leave "
                "out one of them"
            )
        if self.aggregation.sharing_part.leaves_alone:
            raise ValueError(
                f"aggregation.adapters: what rule '{rule.name}' remembers may move a factor in the rounds that leave "
                "it alone; choose both, ffa or fedsa"
            )

    def _check_counted_steps(self, key: str) -> None:
        """Refuse steps of which one does not lead as far as the next."""
        training = self.training
        if training.optim != "sgd" or training.optim_args:
            raise ValueError(
                f"{key} divides a change by the steps that led to it, which is right for plain SGD alone; under AdamW "
                "it has learnt less than the mean: choose rule 'fedavg', or training.optim sgd without optim_args"
            )
        if self.aggregation.proximal_mu > 0:
            raise ValueError(
                f"{key} takes all steps to lead as far, and proximal_mu holds later ones back; leave it out"
            )

    def _check_factors(self, key: str) -> None:
        """Refuse what does not go together with factors that a server makes anew of their products."""
        if not self.tuning_part.has_factors:
            raise ValueError(
                f"{key} is for the factors of LoRA, and tuning.mode is '{self.tuning.mode}'; choose rule 'fedavg', or "
                "mode lora or qlora"
            )
        if self.trains_parts is not None:
            raise ValueError(f"{key} makes both factors anew, all components; leave out {self.trains_parts}")
        if self.aggregation.outer.used:
            raise ValueError(
                f"{key} makes factors that are no mean of the sites', and aggregation.outer goes by their "
                "mean; leave out one of them"
            )

    def _check_groups(self, rule: AggregationPart[Any]) -> None:
        key = f"aggregation.rule: {rule.name}"
        if self.topology.judged_by:
            raise ValueError(
                f"topology.judged_by: under {key} every site tries each group's mean; leave out one of them"
            )
        if self.topology.asked_beyond:
            raise ValueError(f"topology.asked_beyond: under {key} a round waits for all of a group; leave it out")
        sites = self.topology.sites
        if sites is not None and (said := self.too_few_for_groups(sites)):
            raise ValueError(said)

    def _check_outer_step(self) -> None:
        in_group = self.aggregation.mixing_part.one_state and self.privacy.ring_bits is not None
        if self.topology.kind == "gossip" and not in_group:
            raise ValueError(
                "aggregation.outer: it steps from one state that all nodes hold, which those of a ring's group make "
                "sure of; choose mixing 'group' and a ring (privacy.codec), or leave it out"
            )
        if self.aggregation.outer.step_part.reads_norms:
            self._check_norms(f"aggregation.outer.step: {self.aggregation.outer.step}")
        if self.aggregation.scaffold:
            raise ValueError(
                "aggregation.outer: SCAFFOLD takes the state that a site gets for the mean of what the sites sent; "
                "leave out one of them"
            )

    def _check_norms(self, key: str) -> None:
        if self.topology.kind == "gossip":
            raise ValueError(f"{key} goes by each update's norm, and nodes of a ring's group see their sum alone")
        if self.privacy.secure is not None:
            raise ValueError(
                f"{key} goes by each update's norm, which under privacy.secure_aggregation is a site's own word: one "
                "could have the step be of any length; leave out one of them"
            )
        if not self.aggregation.rule_part.is_weighted_mean:
            raise ValueError(
                f"{key} goes by the norms of all updates, which rule '{self.aggregation.rule}' does not trust; choose "
                "rule 'fedavg', or another step"
            )

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

    def alone(self, steps: int, learning_rate: float | None = None) -> Recipe:
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

    @property
    def engine_digest(self) -> str:
        """SHA-256 (hex) over what decides the training at a site: parties with one digest run the same recipe."""
        # What lies elsewhere at each site is compared by content instead: see `initial_digest` of an engine. The data,
        # a reward function and how its curve is kept are the site's own, and never compared.
        places: Any = dict.fromkeys(("model", "data", "deepspeed", "simulation", "output"), True)
        own = {"rollout": {"reward_model", "reward_function"}, "training": {"logging_steps", "report_to"}}
        parts = self.model_dump(exclude={**places, **own})
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def flat(self) -> dict[str, str | int | float | bool]:
        """The keys as people write overrides, with plain values (lists as JSON); those that are unset are left out."""
        return _flat(self.model_dump(), "")

    def to_yaml(self) -> str:
        """The recipe with every default written out."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def _undoing_privacy(recipe: Recipe) -> list[tuple[bool, str, str]]:
    """What cannot go together with differential privacy: whether the recipe has it, the key, and why not."""
    training, topology, terms = recipe.training, recipe.topology, recipe.privacy.differential_privacy
    by_held_out = "nothing goes by held-out records, which the noise does not cover; leave it out"
    level = _undoing_privacy_of_sites if terms is not None and terms.of_sites else _undoing_privacy_of_records
    return [
        *level(recipe),
        (
            recipe.tries_groups,
            f"aggregation.rule: {recipe.aggregation.rule}",
            "nothing goes by held-out records, which the noise does not cover; choose fedavg",
        ),
        (
            topology.own_pace is not None,
            topology.own_pace or "",
            "what a round releases is counted in steps that the recipe names; give topology.local_steps",
        ),
        (topology.early_stopping_patience is not None, "topology.early_stopping_patience", by_held_out),
        (training.load_best_model_at_end, "training.load_best_model_at_end", by_held_out),
        (bool(topology.judged_by), "topology.judged_by", by_held_out),
        (
            topology.own_steps is not None and topology.kind != "central",
            "topology.own_steps",
            "a site's own model would be another release; leave it out",
        ),
    ]


def _undoing_privacy_of_records(recipe: Recipe) -> list[tuple[bool, str, str]]:
    training, part = recipe.training, recipe.stage_part
    return [
        (
            part.samples or part.rows_compared is not None,
            "stage",
            f"the loss must be a sum over records, and that of {recipe.stage} is not; choose pretrain, sft, reward, "
            "dpo, orpo or simpo",
        ),
        (bool(training.packing), "training.packing", "each record has a row of its own; leave it out"),
        (
            recipe.tuning_part.has_factors and bool(recipe.tuning.settings(LORA).site_ranks),
            "tuning.lora.site_ranks",
            "each unit's gradient is clipped as a whole; leave it out",
        ),
        (recipe.deepspeed.used, "deepspeed", "each unit's gradient is needed by itself, which DeepSpeed does not give"),
        (training.torch_compile, "training.torch_compile", "a compiled model does not give each unit's gradient"),
        (recipe.data.cache is not None, "data.cache", "whose a record is has to be read with it; leave it out"),
        (bool(recipe.data.mix), "data.mix", "one record more or less would have others drawn; leave it out"),
        (
            recipe.data.max_samples is not None,
            "data.max_samples",
            "one record more or less would bring in another; leave it out",
        ),
        (
            bool(recipe.model.router_aux_loss_coef),
            "model.router_aux_loss_coef",
            "each unit's loss must be its own, and a balance is one of all that are computed together; leave it out",
        ),
        (
            recipe.aggregation.weights == "loss_units" and recipe.topology.kind != "central",
            "aggregation.weights",
            "a weight must not tell what was drawn, and loss_units does; choose equal, given or records",
        ),
    ]


def _undoing_privacy_of_sites(recipe: Recipe) -> list[tuple[bool, str, str]]:
    privacy = recipe.privacy
    return [
        (
            recipe.topology.kind == "central",
            "topology.kind",
            "of level site there are sites that sum up; choose federated or gossip, or level: record",
        ),
        (
            privacy.secure is None,
            "privacy.secure_aggregation",
            "of level site each site adds a share of the noise, which hides it in a masked sum alone; set it to true",
        ),
        (recipe.aggregation.weights != "equal", "aggregation.weights", "of level site all weigh the same; set equal"),
        (
            privacy.clip is not None,
            "privacy.clip",
            "of level site it follows from differential_privacy.clip; leave it out",
        ),
    ]


def _flat(document: Mapping[str, Any], prefix: str) -> dict[str, str | int | float | bool]:
    flat: dict[str, str | int | float | bool] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value if isinstance(value, str | int | float | bool) else json.dumps(value)
    return flat
