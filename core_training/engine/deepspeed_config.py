"""The DeepSpeed configuration that a recipe's `deepspeed` section stands for; transformers fills its keys "auto"."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_training.foundation.bounded_reading import MOST_YAML_BYTES, ForeignTextError, read_json
from core_training.foundation.errors import InputError
from core_training.recipe.schema import Recipe

if TYPE_CHECKING:
    from torch import nn


def deepspeed_config(recipe: Recipe) -> dict[str, Any] | None:
    """The configuration; None without DeepSpeed. Raises InputError when `deepspeed.config` cannot be read."""
    settings = recipe.deepspeed
    if not settings.used:
        return None
    if settings.config is not None:
        try:
            document = read_json(Path(settings.config), MOST_YAML_BYTES)
        except (OSError, ForeignTextError) as error:
            raise InputError(f"deepspeed.config: {settings.config} cannot be read as JSON: {error}") from None
        if not isinstance(document, dict):
            raise InputError(f"deepspeed.config: {settings.config} must hold a JSON object")
        if document.get("zero_optimization", {}).get("round_robin_gradients"):
            raise InputError(
                f"deepspeed.config: {settings.config}: turn zero_optimization.round_robin_gradients off; with it "
                "DeepSpeed's master copies belong to other parameters, and a state cannot be read or written"
            )
        return document
    bfloat16 = recipe.model.dtype == "bfloat16"
    # DeepSpeed's bfloat16 optimizer without ZeRO keeps float32 master copies that cannot be read, and begins with an
    # empty step, which makes Adam's first real ones smaller. Stage 1 has neither fault, and needs less memory.
    stage = 1 if bfloat16 and settings.stage == 0 else settings.stage
    zero: dict[str, Any] = {"stage": stage}
    if stage == 2:
        zero |= {
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "allgather_bucket_size": 5e8,
            "reduce_bucket_size": 5e8,
        }
    if stage == 3:
        zero |= {
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    if settings.offload in ("optimizer", "all"):
        zero["offload_optimizer"] = {"device": "cpu"}
    if settings.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bfloat16},
        "steps_per_print": 1_000_000_000,
    }


def check_rounds(recipe: Recipe) -> None:
    """Raise InputError where rounds ask for what DeepSpeed does not do: it may be a site's own choice (`site.yaml`)."""
    if not recipe.deepspeed.used or recipe.topology.kind == "central":
        return
    if recipe.trains_parts is not None:
        raise InputError(
            f"deepspeed: {recipe.trains_parts} leaves parameters alone that DeepSpeed keeps to itself; train without "
            "it, or without them"
        )
    if recipe.topology.local_seconds is not None:
        raise InputError("deepspeed: the processes of a group have a clock each; train without it, or by local_steps")
    if recipe.topology.own_steps is not None:
        raise InputError("deepspeed: a group trains one state; train without it, or without topology.own_steps")


def plugin(recipe: Recipe, model: nn.Module, peak_rate: float, total_steps: int) -> Any:
    """The plugin by which accelerate uses DeepSpeed as the recipe says, every key "auto" filled in.

    It also makes accelerate forget the engine that this process had before: there is one at a time.
    """
    import torch
    from transformers import TrainingArguments

    training = recipe.training
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is written there
        deepspeed=deepspeed_config(recipe),
        use_cpu=not torch.cuda.is_available(),
        bf16=recipe.model.dtype == "bfloat16",
        learning_rate=peak_rate,
        weight_decay=training.weight_decay,
        warmup_steps=training.warmup_of(total_steps),
        max_grad_norm=training.max_grad_norm,
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        report_to="none",
    )
    arguments.hf_deepspeed_config.trainer_config_finalize(arguments, model, total_steps)
    return arguments.deepspeed_plugin
