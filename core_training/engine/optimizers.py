"""Optimizers and schedules by the names that transformers gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, Trainer, get_scheduler

from core_training.recipe.schema import Recipe


@dataclass(frozen=True)
class _OptimizerArguments:
    """The settings from which transformers chooses an optimizer.

    Its own `TrainingArguments` hold the same and a hundred fields more, and making one resets accelerate's state for
    the whole process: every other run in it would be dead.
    """

    optim: str
    learning_rate: float
    optim_args: str | None = None
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8


def build_optimizer(model: PreTrainedModel, recipe: Recipe) -> Optimizer:
    """The recipe's optimizer of the parameters that are trained; biases and norms are not decayed."""
    training = recipe.training
    decayed = set(Trainer.get_decay_parameter_names(cast("Any", None), model))
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in trained if name in decayed], "weight_decay": training.weight_decay},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    ]
    arguments: Any = _OptimizerArguments(training.optim, recipe.learning_rate)
    optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    optimizer: Optimizer = optimizer_class(groups, **settings)
    return optimizer


def build_schedule(optimizer: Optimizer, recipe: Recipe, total_steps: int) -> LRScheduler:
    """The recipe's schedule over so many steps of `optimizer`."""
    training = recipe.training
    schedule: LRScheduler = get_scheduler(
        training.lr_scheduler_type,
        optimizer,
        num_warmup_steps=training.warmup_steps,
        num_training_steps=total_steps,
    )
    return schedule
