"""Digests of what was loaded, as it lies in memory: what two sites start from is this, whatever their files are called.

A digest of files says less: a configuration decides what is computed with the weights, and can name other files than
those that somebody has looked at. Nothing here depends on where a model lies, on the machine, or on PyTorch's version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from core_training.models.parameters import all_parameters, persistent_buffers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OF_THE_PLACE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_commit_hash")
"""Keys of a configuration that say where it was found, what wrote it, or what the recipe says in their place."""

_OF_A_CALL = ("truncation", "padding")
"""Parts of a fast tokenizer that every call sets anew."""


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 (hex) over the names, types, shapes and values of tensors, in the order of their names."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hasher.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def model_digests(model: PreTrainedModel) -> dict[str, str]:
    """SHA-256 (hex) of a model's parts: its weights (parameters, buffers), configuration and generation settings."""
    generation: Any = getattr(model, "generation_config", None)
    return {
        "weights": tensors_digest({**all_parameters(model), **persistent_buffers(model)}),
        "configuration": _settings_digest(model.config.to_json_string(use_diff=False)),
        "generation settings": _settings_digest("null" if generation is None else generation.to_json_string()),
    }


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) over all that turns a text into tokens and back; the chat template has a digest of its own."""
    said = {
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "added": {number: repr(token) for number, token in tokenizer.added_tokens_decoder.items()},
        "splits special tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
        "cleans up": bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)),
        "backend": _backend(tokenizer),
    }
    return _digest(said)


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The rules and the vocabulary: a fast tokenizer's own document, the digests of another one's files."""
    if tokenizer.is_fast:
        document: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        return {part: value for part, value in document.items() if part not in _OF_A_CALL}
    files = [Path(tokenizer.name_or_path) / name for name in tokenizer.vocab_files_names.values()]
    contents = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}
    return {"files": contents, "vocabulary": sorted(tokenizer.get_vocab().items())}


def _settings_digest(text: str) -> str:
    return _digest(_without_place(json.loads(text)))


def _without_place(settings: Any) -> Any:
    if isinstance(settings, list):
        return [_without_place(one) for one in settings]
    if not isinstance(settings, dict):
        return settings
    return {key: _without_place(value) for key, value in settings.items() if key not in _OF_THE_PLACE}


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
