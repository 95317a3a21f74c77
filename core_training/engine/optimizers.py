"""Optimizers and schedules by the names that transformers gives them, as its `Trainer` makes them.

The `Trainer` itself is asked for the rarer ones alone: with it come pandas, pyarrow and datasets, which take longer to
import than a step.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from transformers import get_scheduler

from core_training.foundation.errors import InputError
from core_training.parts.tuning_modes.lora import LORA
from core_training.recipe.schema import Recipe
from core_training.recipe.sections.training import Training

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import PreTrainedModel

_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|\.|_)norm($|\.)", re.IGNORECASE)


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
    weight_decay: float
    optim_args: str | None


def build_optimizer(model: PreTrainedModel, recipe: Recipe, peak_rate: float) -> Optimizer:
    """The recipe's optimizer of the parameters that are trained; biases and norms are not decayed.

    Raises InputError where its package lacks.
    """
    training, decayed = recipe.training, decayed_parameters(model)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    ratio = recipe.tuning.settings(LORA).loraplus_lr_ratio or 1.0
    groups: list[dict[str, Any]] = []
    for of_b in (False, True) if ratio != 1 else (False,):
        rate = peak_rate * (ratio if of_b else 1)
        here = [(name, parameter) for name, parameter in trained if ratio == 1 or ("lora_B" in name) == of_b]
        for decay, with_decay in ((training.weight_decay, True), (0.0, False)):
            chosen = [parameter for name, parameter in here if (name in decayed) == with_decay]
            groups.append({"params": chosen, "weight_decay": decay, "lr": rate})
    kind, settings = _kind(model, training, peak_rate)
    if settings.get("optim_bits") == 8:
        _keep_embeddings_exact(model)
    optimizer: Optimizer = kind(groups, **settings)
    return optimizer


def decayed_parameters(model: nn.Module) -> set[str]:
    """The names of the parameters that weight decay is for: all but biases and those of norms, as of `Trainer`."""
    norms = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.LayerNorm))
    return {name for name, _ in model.named_parameters() if not (_NOT_DECAYED.search(name) or name.startswith(norms))}


def build_schedule(optimizer: Optimizer, recipe: Recipe, total_steps: int) -> LambdaLR:
    """The recipe's schedule over so many steps of `optimizer`. Raises InputError for settings that it has not."""
    training = recipe.training
    kind, settings = training.lr_scheduler_type, dict[str, Any](training.lr_scheduler_kwargs)
    try:
        if kind == "constant_then_linear":
            kind, settings = "warmup_stable_decay", _constant_then_linear(total_steps, **settings)
        schedule: LambdaLR = get_scheduler(
            kind,
            optimizer,
            num_warmup_steps=training.warmup_of(total_steps),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=settings,
        )
        for factor in schedule.lr_lambdas:  # a setting of another type shows when it is used
            for step in (0, total_steps // 2, total_steps):
                factor(step)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"training.lr_scheduler_kwargs: {str(error).splitlines()[0]}") from None
    return schedule


def _constant_then_linear(total_steps: int, *, decay_ratio: float = 0.3) -> dict[str, Any]:
    """The settings of a rate that stays, and falls to 0 over a last share of the steps (Hägele et al. 2024)."""
    if not 0 < decay_ratio <= 1:
        raise ValueError(f"decay_ratio: it is a share of all steps above 0 and up to 1, not {decay_ratio}")
    return {"num_decay_steps": math.ceil(decay_ratio * total_steps), "decay_type": "linear"}


def _kind(model: PreTrainedModel, training: Training, rate: float) -> tuple[type[Any], dict[str, Any]]:
    """The class of the optimizer and what it is made with."""
    betas = (training.adam_beta1, training.adam_beta2)
    if training.optim == "adamw_torch":
        return AdamW, {"lr": rate, "betas": betas, "eps": training.adam_epsilon}
    if training.optim == "sgd" and training.optim_args is None:
        return SGD, {"lr": rate}
    from transformers import Trainer

    arguments: Any = _OptimizerArguments(
        training.optim, rate, *betas, training.adam_epsilon, training.weight_decay, training.optim_args
    )
    try:
        kind: tuple[type[Any], dict[str, Any]] = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    except (ImportError, ValueError, RuntimeError) as error:
        raise InputError(f"training.optim: {training.optim}: {str(error).splitlines()[0]}") from None
    return kind


def _keep_embeddings_exact(model: PreTrainedModel) -> None:
    """Have bitsandbytes keep the moments of embeddings in 32 bits, whose rows differ most (Dettmers et al. 2021)."""
    from bitsandbytes.optim import GlobalOptimManager  # type: ignore[attr-defined]

    manager = GlobalOptimManager.get_instance()
    manager.initialize()  # it is one for the process, and knows parameters by their places in a run's groups
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
