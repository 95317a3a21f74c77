"""The section `training`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from core_training.parts.section import MOST, BatchRows, Count, PositiveInt, Section
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
