"""LoRA: two low-rank factors beside each chosen linear layer are trained; the base stays as it is (Hu et al. 2021)."""

from __future__ import annotations

from typing import Any

from core_training.errors import InputError
from core_training.recipe import Recipe


def apply(model: Any, recipe: Recipe) -> Any:
    """The model with adapters. Raises InputError when a target module does not exist."""
    from peft import LoraConfig, get_peft_model

    settings = recipe.tuning.lora
    targets = settings.target_modules
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        linear = sorted(
            {name.split(".")[-1] for name, module in model.named_modules() if hasattr(module, "in_features")}
        )
        raise InputError(
            f"tuning.lora.target_modules: {targets} does not fit this model ({error}); it has {', '.join(linear)}"
        ) from None
