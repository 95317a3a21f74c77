"""A finished run's result put to use: loaded, and written for use elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from core_training.foundation.durable import commit_folder, new_folder, share
from core_training.foundation.errors import InputError, ProtocolError, RunError
from core_training.foundation.hub_models import hub_model
from core_training.foundation.model_files import settings_in
from core_training.foundation.state import TrainableState
from core_training.models.base_model import BaseModel
from core_training.models.endings import generation_settings, own_settings_aside
from core_training.models.export import base_reference, served_padding
from core_training.models.loading import check_loads_whole, load_tokenizer, restore_buffers, unquantised
from core_training.models.merging import merged
from core_training.models.parameters import write_parameters
from core_training.models.probe import check_adapter, check_written, has_room_for
from core_training.parts.tuning_modes.lora import LORA
from core_training.recipe.schema import Recipe
from core_training.runs.finished_run import Result, find_result
from core_training.runs.result_format import (
    ADAPTER_CONFIG,
    ADAPTER_PREFIX,
    ADAPTER_WEIGHTS,
    GENERATION_CONFIG,
    read_origin,
    read_result,
)
from core_training.tuning.base import load_tuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Result",
    "export_adapter",
    "export_model",
    "find_result",
    "load_known_reward_model",
    "load_result",
    "load_reward_model",
]


def load_result(result: Result) -> BaseModel:
    """The base model with the trained state in it, held as it was in training, ready to be asked.

    Raises InputError when the base model is not here, or is not the one that was trained on.
    """
    return _load(result, result.recipe)


def load_reward_model(run: Path, vocabulary: str) -> PreTrainedModel:
    """The reward model that a run of stage `reward` trained, to judge with: a sequence classifier, merged and frozen.

    `vocabulary` is the `vocabulary_digest` of the model whose answers it judges. Raises InputError when the run is of
    another stage, and when its tokens are not those of that model.
    """
    return load_known_reward_model(run, vocabulary)[0]


def load_known_reward_model(run: Path, vocabulary: str) -> tuple[PreTrainedModel, str]:
    """The same, and a SHA-256 (hex) over what was loaded of it: its base as loaded, and what was trained."""
    try:
        result = find_result(run)
        if result.recipe.stage != "reward":
            raise InputError(f"{run} is of stage {result.recipe.stage}; name a run of stage reward")
        _require_base(result, "model.name_or_path in its recipe.yaml must be found here")
        if read_origin(result.folder).vocabulary_digest != vocabulary:
            raise InputError(
                f"the reward model {run} reads other tokens than the model that it judges: train one on a base with "
                "the same tokenizer"
            )
        base = _load(result, unquantised(result.recipe))
        loaded = base.initial_digest  # of the trained state, which is what the base holds by now
        model = merged(base.model)
    except (InputError, ProtocolError) as error:
        raise InputError(f"rollout.reward_model: {error}") from None
    model.requires_grad_(False)
    model.eval()
    return model, loaded


def export_adapter(result: Result, to: Path) -> bool:
    """Write the adapter alone, as PEFT and vLLM load it. Returns whether the tokenizer could be put beside it.

    Where the base model is on this machine, the adapter names it by its absolute path, or by its name on the hub and
    the commit. Raises InputError when `to` holds something, and for an adapter that fits no model on disk.
    """
    to = new_folder(to)
    if result.recipe.model.adapters:
        raise InputError(
            "the run started from earlier runs (model.adapters), so its adapter alone fits no model on disk; "
            "write the whole model with --merge"
        )
    base = result.base_folder
    tokenizer = load_tokenizer(result.recipe) if base is not None else None
    with commit_folder(to) as scratch:
        shutil.copytree(result.folder, scratch, dirs_exist_ok=True)
        _fit_to_plain_peft(result, scratch)
        if tokenizer is not None:
            _update_config(scratch, **base_reference(result.base_name))
            tokenizer.save_pretrained(scratch)
            _check_adapter(result, scratch)
        share(scratch)
    return tokenizer is not None or (to / "tokenizer_config.json").exists()


def _check_adapter(result: Result, folder: Path) -> None:
    """Put an adapter on its base as others do, and raise RunError where it does not say what the run's model says."""
    trained = _load(result, unquantised(result.recipe))
    if not has_room_for(trained.model, folder):
        return
    try:
        check_adapter(trained.model, trained.folder, folder)
    except RunError as error:
        raise RunError(f"{error}. Until then write the whole model, with --merge") from None


def export_model(result: Result, to: Path) -> None:
    """Write one whole model with its tokenizer, in the base model's dtype: an adapter merged, or layers put in place.

    Raises InputError when `to` holds something, and as `load_result`.
    """
    to = new_folder(to)
    base = _load(result, unquantised(result.recipe))
    model = merged(base.model)
    if not hasattr(model, "score"):
        check_loads_whole(model, "--merge", "export the adapter")
    ends = generation_settings(model, base.end_tokens)
    with commit_folder(to) as scratch:
        with served_padding(base), own_settings_aside(model):
            model.save_pretrained(scratch)
        if model.can_generate():
            (scratch / GENERATION_CONFIG).write_text(ends, encoding="utf-8")
        base.tokenizer.save_pretrained(scratch)
        share(scratch)
        check_written(model, scratch)


def _load(result: Result, recipe: Recipe) -> BaseModel:
    _require_base(result, "name it with --base DIR (paths are relative to the folder a command is run in)")
    base = BaseModel(recipe)
    write_parameters(base.trainable_parameters, trained_state(result, base))
    try:
        restore_buffers(base.model, result)
    except ProtocolError as error:
        raise InputError(f"{result.folder} does not fit the base model {base.folder}: {error}") from None
    base.model.eval()
    base.model.config.use_cache = True
    return base


def trained_state(result: Result, base: BaseModel) -> TrainableState:
    """The state that the run trained, for its base model. Raises InputError when this is another one."""
    try:
        origin = read_origin(result.folder)
        of_base = not result.is_whole_model or base.has_frozen_weights
        if of_base and origin.base_digest != base.base_digest:
            raise ProtocolError(
                f"it was trained on a base of digest {origin.base_digest[:12]}…, this one has {base.base_digest[:12]}…"
            )
        return read_result(result.folder, base.manifest)
    except ProtocolError as error:
        raise InputError(f"{result.folder} does not fit the base model {base.folder}: {error}") from None


def _require_base(result: Result, remedy: str) -> Path:
    if result.base_folder is None:
        name = result.recipe.model.name_or_path
        model = hub_model(name)
        fetched = f", or fetch it with `fedloom model get {name}`" if model is not None and model.is_pinned else ""
        raise InputError(f"the base model '{name}' is not here; {remedy}{fetched}")
    return result.base_folder


def _fit_to_plain_peft(result: Result, folder: Path) -> None:
    """Turn the adapter in `folder` into what PEFT puts on the model as it lies on disk.

    PiSSA and OLoRA trained on W − s·B₀A₀, the base without the initial factors. W + s·(BA − B₀A₀) is the same, and an
    adapter of twice the rank: [B, −B₀] and [A; A₀] (PEFT's documentation of PiSSA does so too).
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        copies = read_origin(result.folder).copies
    except (SafetensorError, ProtocolError) as error:
        raise InputError(f"{result.folder} cannot be read: {error}") from None
    lora = result.recipe.tuning.settings(LORA)
    if result.recipe.tuning_part.is_folded:
        _require_base(result, "the adapter's fixed factors come from its weights; name it with --base DIR")
        tensors = _folded(result, tensors)
        _update_config(folder, peft_type="LORA")
    elif lora.carves:
        _require_base(result, "the adapter started from its weights, so they are needed; name it with --base DIR")
        initial = dict(BaseModel(unquantised(result.recipe)).initial_state.tensors())
        tensors = {name: _joined(name, t, initial[name.removeprefix(ADAPTER_PREFIX)]) for name, t in tensors.items()}
        # The scale stays what it was: lora_alpha over r, or over its root.
        alpha = lora.lora_alpha * (2**0.5 if lora.use_rslora else 2)
        _update_config(folder, r=2 * lora.r, lora_alpha=alpha, init_lora_weights=True)
    for copy, name in copies.items():
        if ADAPTER_PREFIX + name not in tensors or ADAPTER_PREFIX + copy in tensors:
            raise InputError(f"{result.folder}: fedloom.json: copies: '{copy}' cannot be a copy of '{name}' here")
        tensors[ADAPTER_PREFIX + copy] = tensors[ADAPTER_PREFIX + name]
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _folded(result: Result, tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """The adapter's tensors with PEFT's factors in the place of what is trained between frozen ones."""
    base = BaseModel(unquantised(result.recipe))
    write_parameters(base.trainable_parameters, trained_state(result, base))
    plain = {name.removeprefix(ADAPTER_PREFIX): values for name, values in tensors.items()}
    folded = load_tuning(result.recipe).folded(base.model, plain)
    return {ADAPTER_PREFIX + name: values for name, values in folded.items()}


def _joined(name: str, trained: npt.NDArray[Any], initial: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if name.endswith("lora_A.weight"):
        return np.concatenate([trained, initial], axis=0)
    if name.endswith("lora_B.weight"):
        return np.concatenate([trained, -initial], axis=1)
    return trained


def _update_config(folder: Path, **values: Any) -> None:
    path = folder / ADAPTER_CONFIG
    config = settings_in(path) | values
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
