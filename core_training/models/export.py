"""The small files of a result, in which a tuned model describes itself beside its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, cast

from core_training.foundation.hub_models import hub_model
from core_training.models.base_model import BaseModel
from core_training.models.endings import generation_settings
from core_training.models.heads import innermost
from core_training.models.padding import loading_empties_padding
from core_training.models.parameters import as_array, other_names, persistent_buffers
from core_training.recipe.schema import Recipe
from core_training.runs.result_format import (
    ADAPTER_CONFIG,
    BUFFERS,
    GENERATION_CONFIG,
    LAYERS,
    MODEL_CONFIG,
    ORIGIN,
    Origin,
    buffers_text,
    result_name,
)

if TYPE_CHECKING:
    from peft import PeftModel


@contextmanager
def served_padding(base: BaseModel) -> Iterator[None]:
    """No padding token in the configuration of a model that would be read as another one for it.

    That is a reward model whose padding token is the one that ends answers: transformers' classifiers score the last
    token that is no padding. Of one sequence they then score the last token, and refuse several; with the padding token
    they would score the last token but one. And it is a language model that loses that token's row when it is loaded.
    """
    model = innermost(base.model)
    config, kept = base.model.config, base.model.config.pad_token_id
    scores = hasattr(model, "score")
    if kept == base.tokenizer.eos_token_id if scores else loading_empties_padding(model):
        config.pad_token_id = None
    try:
        yield
    finally:
        config.pad_token_id = kept


def base_reference(base_name: str) -> dict[str, str | None]:
    """The base model as an adapter's configuration names it: a hub's name and its revision are two fields there."""
    model = hub_model(base_name)
    name, revision = (base_name, None) if model is None else (model.name, model.revision)
    return {"base_model_name_or_path": name, "revision": revision}


def layout_files(base: BaseModel, recipe: Recipe, base_name: str, *, without_base: bool = False) -> dict[str, str]:
    """The small files that stand beside the weights; `base_name` is what they call the base model."""
    origin = Origin(base.base_digest, base.vocabulary_digest, other_names(base.model))
    files = {ORIGIN: json.dumps(asdict(origin), indent=2)}
    kind = result_name(recipe)
    if kind == "model" and without_base and base.has_frozen_weights:
        kind = LAYERS
    if recipe.stage_part.head != "score" and kind != LAYERS:
        files[GENERATION_CONFIG] = generation_settings(innermost(base.model), base.end_tokens)
    if kind == "model":
        base.model.config.architectures = [type(base.model).__name__]
        with served_padding(base):
            files[MODEL_CONFIG] = base.model.config.to_json_string()
        if buffers := persistent_buffers(base.model):
            files[BUFFERS] = buffers_text({name: as_array(buffer) for name, buffer in buffers.items()})
    elif hasattr(base.model, "peft_config"):
        config = cast("PeftModel", base.model).peft_config["default"].to_dict()
        # Nowhere on disk is there a base with earlier runs in it: such a name is loaded by no one by mistake.
        runs = f" with {count} earlier runs merged in" if (count := len(recipe.model.adapters)) else ""
        config |= base_reference(base_name)
        config["base_model_name_or_path"] += runs
        config["inference_mode"] = True
        if recipe.tuning_part.is_folded:  # nobody shall take it for an adapter that PEFT can load as it is
            config["peft_type"] = recipe.tuning.mode.upper()
        plain = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.items()}
        files[ADAPTER_CONFIG] = json.dumps(plain, indent=2, sort_keys=True)
    return files
