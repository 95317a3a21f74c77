"""Writing what was trained in the layouts that PEFT, transformers and vLLM load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from core_training.base_model import BaseModel
from core_training.durable import commit_folder
from core_training.recipe import Recipe
from core_training.state import TrainableState


def is_adapter(model: Any) -> bool:
    """Whether the model is a base with PEFT adapters on it."""
    return hasattr(model, "peft_config")


def layout_files(base: BaseModel, recipe: Recipe) -> dict[str, str]:
    """The configuration that stands beside the weights, with the recipe's name for the base model, not a local path."""
    if not is_adapter(base.model):
        return {"config.json": base.model.config.to_json_string()}
    config = base.model.peft_config["default"].to_dict()
    config["base_model_name_or_path"] = recipe.model.name_or_path
    plain = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.items()}
    return {"adapter_config.json": json.dumps(plain, indent=2, sort_keys=True)}


def write_result(state: TrainableState, layout: Mapping[str, str], folder: Path) -> None:
    """Write a state in the layout PEFT or transformers loads, where there is no model at hand (a server)."""
    from safetensors.numpy import save_file

    adapter = "adapter_config.json" in layout
    prefix = "base_model.model." if adapter else ""
    with commit_folder(folder) as scratch:
        for name, content in layout.items():
            (scratch / name).write_text(content, encoding="utf-8")
        save_file(
            {prefix + name: values for name, values in state.tensors()},
            scratch / ("adapter_model.safetensors" if adapter else "model.safetensors"),
            metadata={"format": "pt"},
        )


def save_result(base: BaseModel, folder: Path, accelerator: Any) -> None:
    """Write the adapter, or the whole model, and the tokenizer into `folder`. Every process of a group must call this."""
    model = base.model
    gather: Any = nullcontext()
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        import deepspeed

        gather = deepspeed.zero.GatheredParameters(list(model.parameters()))
    with gather:
        if accelerator.is_main_process:
            with commit_folder(folder) as scratch:
                if is_adapter(model):
                    # Looking for resized embeddings would ask the hub for the base model's vocabulary.
                    model.save_pretrained(scratch, save_embedding_layers=False)
                    (scratch / "README.md").unlink(missing_ok=True)
                else:
                    model.save_pretrained(scratch)
                base.tokenizer.save_pretrained(scratch)
    accelerator.wait_for_everyone()
