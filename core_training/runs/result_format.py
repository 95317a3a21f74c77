"""A result's files: what was trained, in the layouts that PEFT, transformers and vLLM load; written and read back.

A trainable state and a few small configuration files are enough, so a server without a model can do it too. It does
not know the frozen weights, though: of a run of mode `freeze` it writes the trained layers alone (`layers/`), and
`fedloom export` makes a model of them and the base. PPO's value head has a file of its own, which no one else looks at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from core_training.foundation.bounded_reading import ForeignTextError, first_error, read_bounded
from core_training.foundation.durable import commit_folder, share
from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import Manifest, TrainableState
from core_training.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTER_CONFIG = "adapter_config.json"
MODEL_CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."
_MODEL_WEIGHTS = "model.safetensors"
_LAYER_WEIGHTS = "layers.safetensors"
_VALUE_HEAD_WEIGHTS = "value_head.safetensors"
ORIGIN = "fedloom.json"
_MOST_BYTES = 16 * 2**20
BUFFERS = "buffers.json"
"""Buffers of a whole model on their way to `write_result`, which puts them beside the weights."""


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Origin:
    """The origin of a result, in `fedloom.json` beside it: digests of `BaseModel`.

    A server has the file as most sites describe it.
    """

    base_digest: str
    vocabulary_digest: str
    copies: dict[str, str] = field(default_factory=dict)
    """Names under which PEFT also keeps a trained tensor that the model has in two places: copy: its canonical name."""


LAYERS = "layers"
"""The folder of a result that needs the base's weights beside its own to be a model."""


def result_name(recipe: Recipe) -> str:
    """The folder of a run's result where the base model is at hand: `adapter` or `model`."""
    return "model" if recipe.tuning_part.result == "layers" else recipe.tuning_part.result


def result_folder(layout: Mapping[str, str]) -> str:
    """The folder of a result with these small files: `adapter`, `model` or, without the frozen weights, `layers`."""
    if ADAPTER_CONFIG in layout:
        return "adapter"
    return "model" if MODEL_CONFIG in layout else LAYERS


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid", ser_json_inf_nan="constants"))
class Buffer:
    """A buffer's values as text: floating-point ones as float32, whose digits JSON keeps."""

    dtype: Literal["float32", "int64", "bool"]
    shape: list[int]
    values: list[float | int | bool]

    @classmethod
    def of(cls, array: npt.NDArray[Any]) -> Buffer:
        return cls(str(array.dtype), list(array.shape), array.flatten().tolist())  # type: ignore[arg-type]

    @property
    def array(self) -> npt.NDArray[Any]:
        return np.array(self.values, dtype=self.dtype).reshape(self.shape)


_BUFFERS = TypeAdapter(dict[str, Buffer])


def buffers_text(buffers: Mapping[str, npt.NDArray[Any]]) -> str:
    """The content of `buffers.json`; arrays are float32, int64 or bool."""
    return _BUFFERS.dump_json({name: Buffer.of(array) for name, array in buffers.items()}).decode()


def parse_buffers(text: str) -> dict[str, npt.NDArray[Any]]:
    """The buffers in `buffers.json`. Raises ProtocolError where its content is not what `buffers_text` writes."""
    try:
        return {name: buffer.array for name, buffer in _BUFFERS.validate_json(text).items()}
    except (ValueError, OverflowError) as error:
        raise ProtocolError(f"{BUFFERS} is damaged: {str(error).splitlines()[0]}") from None


def write_result(
    state: TrainableState, layout: Mapping[str, str], folder: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write an adapter (PEFT layout), a model (transformers layout) or layers, as `layout` says, and its tokenizer.

    A whole model's weights have its buffers (`buffers.json` of the layout) beside the trained tensors.
    """
    from safetensors.numpy import save_file

    prefix = ADAPTER_PREFIX if ADAPTER_CONFIG in layout else ""
    layout = dict(layout)
    buffers, weights = parse_buffers(layout.pop(BUFFERS, "{}")), _weights_file(layout)
    files: dict[str, dict[str, Any]] = {weights: buffers if weights == _MODEL_WEIGHTS else {}}
    for name, values in state.tensors():
        if name.startswith("value_head."):
            files.setdefault(_VALUE_HEAD_WEIGHTS, {})[name] = values
        else:
            files[weights][prefix + name] = values
    with commit_folder(folder) as scratch:
        for name, content in layout.items():
            (scratch / name).write_text(content, encoding="utf-8")
        for name, tensors in files.items():
            save_file(tensors, scratch / name, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        share(scratch)


def read_result(folder: Path, manifest: Manifest) -> TrainableState:
    """Read the trained tensors back. Raises ProtocolError when they are damaged or of another manifest."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    weights = folder / _weights_file([path.name for path in folder.glob("*config.json")])
    value_head = folder / _VALUE_HEAD_WEIGHTS
    try:
        arrays = load_file(weights) | (load_file(value_head) if value_head.exists() else {})
    except (OSError, SafetensorError) as error:
        raise ProtocolError(f"{weights} cannot be read: {error}") from None
    arrays = {name.removeprefix(ADAPTER_PREFIX): values for name, values in arrays.items()}
    if (folder / MODEL_CONFIG).exists():  # a model holds its frozen weights too
        trained = {spec.name for spec in manifest.tensors}
        arrays = {name: values for name, values in arrays.items() if name in trained}
    return TrainableState.from_arrays(arrays, manifest)


def read_buffers(folder: Path, names: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
    """Those of these buffers that a whole model's folder holds; earlier versions wrote none."""
    from safetensors import safe_open

    with safe_open(folder / _MODEL_WEIGHTS, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in set(names).intersection(file.keys())}


def read_origin(folder: Path) -> Origin:
    """The origin of the result in this folder. Raises ProtocolError when the folder does not say so."""
    try:
        return TypeAdapter(Origin).validate_json(read_bounded(folder / ORIGIN, _MOST_BYTES))
    except ValidationError as error:
        reason = first_error(error)
    except (OSError, ForeignTextError) as error:
        reason = str(error)
    raise ProtocolError(f"{folder / ORIGIN} does not say what it was trained on: {reason}")


def _weights_file(configurations: Any) -> str:
    if ADAPTER_CONFIG in configurations:
        return ADAPTER_WEIGHTS
    return _MODEL_WEIGHTS if MODEL_CONFIG in configurations else _LAYER_WEIGHTS
