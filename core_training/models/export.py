"""The small files of a result, in which a tuned model describes itself beside its weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, cast

from core_training.models.base_model import BaseModel
from core_training.models.parameters import other_names
from core_training.recipe.schema import Recipe
from core_training.runs.result_format import ADAPTER_CONFIG, MODEL_CONFIG, ORIGIN, Origin, result_name

if TYPE_CHECKING:
    from peft import PeftModel


def layout_files(base: BaseModel, recipe: Recipe, base_name: str, *, without_base: bool = False) -> dict[str, str]:
    """The small files that stand beside the weights; `base_name` is what they call the base model."""
    origin = Origin(base.base_digest, base.vocabulary_digest, other_names(base.model))
    files = {ORIGIN: json.dumps(asdict(origin), indent=2)}
    if result_name(recipe, without_base=without_base) == "model":
        base.model.config.architectures = [type(base.model).__name__]
        files[MODEL_CONFIG] = base.model.config.to_json_string()
    elif hasattr(base.model, "peft_config"):
        config = cast("PeftModel", base.model).peft_config["default"].to_dict()
        # Nowhere on disk is there a base with earlier runs in it: such a name is loaded by no one by mistake.
        runs = f" with {count} earlier runs merged in" if (count := len(recipe.model.adapters)) else ""
        config["base_model_name_or_path"] = base_name + runs
        config["inference_mode"] = True
        plain = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.items()}
        files[ADAPTER_CONFIG] = json.dumps(plain, indent=2, sort_keys=True)
    return files
