"""Getting a stage's model ready to be trained: accelerate puts it, its optimizer and schedule where they belong.

Everything that accelerate would otherwise read from the environment is said here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from core_training.engine import deepspeed_config
from core_training.engine.optimizers import build_optimizer, build_schedule
from core_training.foundation.errors import RunError
from core_training.foundation.heap import give_back_freed_memory
from core_training.models.heads import innermost
from core_training.models.libraries import process_is_ours
from core_training.models.prepared_model import PreparedModel
from core_training.recipe.learning_rate import learning_rate_of, width_of
from core_training.stages.base import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Preparation(NamedTuple):
    """The tools of a loop of steps."""

    prepared: PreparedModel
    optimizer: Any
    """accelerate's optimizer, around PyTorch's or DeepSpeed's."""
    schedule: Any
    """PyTorch's schedule; or DeepSpeed's in accelerate's wrapper, which steps by itself."""


def prepare(stage: Stage[Any], total_steps: int) -> Preparation:
    """The stage's model with the optimizer and schedule of its recipe. Every process of a group must call it."""
    recipe, model = stage.recipe, stage.base.model
    model.train()  # models are loaded to be asked, and an adapter's wrapper says of itself alone that it trains
    if process_is_ours():
        give_back_freed_memory(wanted=recipe.training.gradient_checkpointing)
    if recipe.training.gradient_checkpointing:
        # Each call hooks into the embeddings: one of the many runs that share a model is enough.
        innermost(model).disable_input_require_grads()
        model.activation_checkpointing_enable()
    if recipe.deepspeed.used:
        return _prepare_with_deepspeed(stage, total_steps)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # a bfloat16 model sees to its own autocast (`models.precision`)
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop's own
    )
    prepared, optimizer = accelerator.prepare(model, build_optimizer(model, recipe, _peak_rate(stage)))
    schedule = build_schedule(optimizer.optimizer, recipe, total_steps)
    return Preparation(_prepared(stage, prepared, accelerator), optimizer, schedule)


def _prepare_with_deepspeed(stage: Stage[Any], total_steps: int) -> Preparation:
    """The same under DeepSpeed, whose own optimizer or schedule it is where the user's JSON file names one."""
    from accelerate.utils import DummyOptim, DummyScheduler
    from deepspeed import DeepSpeedEngine

    recipe, model = stage.recipe, stage.base.model
    plugin = deepspeed_config.plugin(recipe, model, _peak_rate(stage), total_steps)
    accelerator = Accelerator(
        deepspeed_plugin=plugin,
        mixed_precision="bf16" if recipe.model.dtype == "bfloat16" else "no",
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    theirs = plugin.deepspeed_config
    if "optimizer" in theirs:
        optimizer: Any = DummyOptim([p for p in model.parameters() if p.requires_grad])
    else:
        optimizer = build_optimizer(model, recipe, _peak_rate(stage))
    if "scheduler" in theirs:
        engine, optimizer, schedule = accelerator.prepare(model, optimizer, DummyScheduler(optimizer))
    else:  # a prepared schedule would step once for each process
        engine, optimizer = accelerator.prepare(model, optimizer)
        schedule = build_schedule(torch_optimizer(optimizer), recipe, total_steps)
    if not isinstance(engine, DeepSpeedEngine):
        raise RunError(f"deepspeed: accelerate prepared a {type(engine).__name__} in place of DeepSpeed's engine")
    return Preparation(_prepared(stage, engine, accelerator), optimizer, schedule)


def _peak_rate(stage: Stage[Any]) -> float:
    return learning_rate_of(stage.recipe, width_of(stage.base.manifest))


def _prepared(stage: Stage[Any], model: PreTrainedModel, accelerator: Accelerator) -> PreparedModel:
    return PreparedModel(stage.base, stage.recipe, model, accelerator, adds_up=stage.adds_up)


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """PyTorch's optimizer inside accelerate's wrapper, and DeepSpeed's inside it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer  # type: ignore[no-any-return]
