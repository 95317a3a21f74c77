"""Writing what was trained in the layouts that PEFT, transformers and vLLM load.

A trainable state and a few small configuration files are enough, so a server without a model can do it too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core_training.durable import commit_folder
from core_training.errors import ProtocolError
from core_training.recipe import Recipe
from core_training.state import Manifest, TrainableState

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ADAPTER_PREFIX = "base_model.model."
_MODEL_WEIGHTS = "model.safetensors"


def result_name(recipe: Recipe) -> str:
    """The folder of a run's result: `model` where whole layers were trained, else `adapter`."""
    return "model" if recipe.tuning.mode in ("full", "freeze") else "adapter"


def layout_files(model: Any, base_name: str) -> dict[str, str]:
    """The configuration that stands beside the weights; `base_name` is what it calls the base model."""
    if not hasattr(model, "peft_config"):
        return {"config.json": model.config.to_json_string()}
    config = model.peft_config["default"].to_dict()
    config["base_model_name_or_path"] = base_name
    config["inference_mode"] = True
    plain = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.items()}
    return {ADAPTER_CONFIG: json.dumps(plain, indent=2, sort_keys=True)}


def write_result(state: TrainableState, layout: Mapping[str, str], folder: Path, tokenizer: Any = None) -> None:
    """Write an adapter (PEFT layout) or a model (transformers layout), as `layout` says, with its tokenizer."""
    from safetensors.numpy import save_file

    adapter = ADAPTER_CONFIG in layout
    prefix = _ADAPTER_PREFIX if adapter else ""
    with commit_folder(folder) as scratch:
        for name, content in layout.items():
            (scratch / name).write_text(content, encoding="utf-8")
        save_file(
            {prefix + name: values for name, values in state.tensors()},
            scratch / (_ADAPTER_WEIGHTS if adapter else _MODEL_WEIGHTS),
            metadata={"format": "pt"},
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)


def read_result(folder: Path, manifest: Manifest) -> TrainableState:
    """Read back what `write_result` wrote. Raises ProtocolError when it is damaged or has another manifest."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    weights = folder / (_ADAPTER_WEIGHTS if (folder / ADAPTER_CONFIG).exists() else _MODEL_WEIGHTS)
    try:
        arrays = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ProtocolError(f"{weights} cannot be read: {error}") from None
    return TrainableState.from_arrays({k.removeprefix(_ADAPTER_PREFIX): v for k, v in arrays.items()}, manifest)
