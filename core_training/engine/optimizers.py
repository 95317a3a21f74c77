"""Optimizers and schedules by the names that transformers gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, Trainer, get_scheduler

from core_training.foundation.errors import InputError
from core_training.parts.tuning_modes.lora import LORA
from core_training.recipe.schema import Recipe


@dataclass(frozen=True)
class _OptimizerArguments:
    """The settings from which transformers chooses an optimizer.

    Its own `TrainingArguments` hold the same and a hundred fields more, and making one resets accelerate's state for
    the whole process: every other run in it would be dead.
    """

    optim: str
    learning_rate: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    optim_args: str | None = None


def build_optimizer(model: PreTrainedModel, recipe: Recipe) -> Optimizer:
    """The recipe's optimizer of the parameters that are trained; biases and norms are not decayed.

    Raises InputError where its package lacks.
    """
    training = recipe.training
    decayed = set(Trainer.get_decay_parameter_names(cast("Any", None), model))
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    betas = (training.adam_beta1, training.adam_beta2)
    arguments: Any = _OptimizerArguments(training.optim, recipe.learning_rate, *betas, training.adam_epsilon)
    try:
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    except (ImportError, ValueError, RuntimeError) as error:
        raise InputError(f"training.optim: {training.optim}: {str(error).splitlines()[0]}") from None
    ratio = recipe.tuning.settings(LORA).loraplus_lr_ratio or 1.0
    groups = []
    for of_b in (False, True) if ratio != 1 else (False,):
        rate = recipe.learning_rate * (ratio if of_b else 1)
        here = [(name, parameter) for name, parameter in trained if ratio == 1 or ("lora_B" in name) == of_b]
        for decay, with_decay in ((training.weight_decay, True), (0.0, False)):
            chosen = [parameter for name, parameter in here if (name in decayed) == with_decay]
            groups.append({"params": chosen, "weight_decay": decay, "lr": rate})
    if settings.get("optim_bits") == 8:
        _keep_embeddings_exact(model)
    optimizer: Optimizer = optimizer_class(groups, **settings)
    return optimizer


def _keep_embeddings_exact(model: PreTrainedModel) -> None:
    """Have bitsandbytes keep the moments of embeddings in 32 bits, whose rows differ most (Dettmers et al. 2021)."""
    from bitsandbytes.optim import GlobalOptimManager  # type: ignore[attr-defined]

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


def build_schedule(optimizer: Optimizer, recipe: Recipe, total_steps: int) -> LRScheduler:
    """The recipe's schedule over so many steps of `optimizer`. Raises InputError for settings that it has not."""
    training = recipe.training
    try:
        schedule: LRScheduler = get_scheduler(
            training.lr_scheduler_type,
            optimizer,
            num_warmup_steps=training.warmup_of(total_steps),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=dict(training.lr_scheduler_kwargs),
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"training.lr_scheduler_kwargs: {str(error).splitlines()[0]}") from None
    return schedule
