"""The shapes of a model's weights, out of its configuration and the headers of its files.

No weight is read and no heavy library imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from core_training.foundation.bounded_reading import open_regular, parse_json, read_json
from core_training.foundation.errors import InputError
from core_training.foundation.model_files import check_model_folder

_LAYER = re.compile(r"\.(\d+)\.")
_LONGEST_HEADER = 100_000_000
"""Bytes; the safetensors library takes no longer one either."""
_OF_NO_ATTENTION = re.compile(r"(?:^|\.)(?:\w*conv\w*|A_log|A|linear_attn|rg_lru)(?:\.|$)")
"""Weights of layers that carry a state from token to token, by their names in the families that have such layers."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class WeightShape:
    """One tensor of a model's files; `stored_bytes` is its size there."""

    name: str
    shape: tuple[int, ...]
    stored_bytes: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        """The name of the module that it is a weight of."""
        return self.name.rpartition(".")[0]

    @property
    def layer(self) -> int | None:
        """The number of the layer that it is in; None for what is outside of the layers."""
        found = _LAYER.search(f".{self.name}")
        return int(found[1]) if found else None

    def is_in(self, module: str) -> bool:
        """Whether its module, or one around it, has this as the last parts of its name."""
        return f".{module}." in f".{self.module}."


@dataclass(frozen=True)
class ModelShapes:
    """A dense decoder's weights by name, and the widths that its configuration states."""

    weights: tuple[WeightShape, ...]
    vocabulary: int
    hidden: int
    """Width of what a layer takes and gives."""
    queries: int
    """Width of all heads' queries together."""
    keys: int
    """Width of all heads' keys together, which is that of their values."""
    context: int | None
    """The most tokens that the model was built to look at, where it says so."""

    @classmethod
    def of(cls, folder: Path) -> ModelShapes:
        """Read them. Raises InputError where there is no such model, or not of a kind whose widths are known here."""
        config = _config(folder)
        check_model_folder(folder)
        kind = config.get("model_type", "unknown")
        if any(config.get(key) for key in _EXPERTS):
            raise InputError(f"models of type {kind} have experts, of which each token takes others")
        hidden = _first(config, "hidden_size", "n_embd")
        heads = _first(config, "num_attention_heads", "n_head")
        vocabulary = config.get("vocab_size")
        if not (hidden and heads and vocabulary):
            raise InputError(f"the configuration of a model of type {kind} does not state the widths of its layers")
        per_head = config.get("head_dim") or hidden // heads
        weights = tuple(_weights(folder, is_tied=bool(config.get("tie_word_embeddings", kind == "gpt2"))))
        if any(_OF_NO_ATTENTION.search(weight.name) for weight in weights):
            raise InputError(
                f"models of type {kind} have layers that are no attention (state spaces, convolutions), whose "
                "activations are not counted; --measure tries a few steps"
            )
        return cls(
            weights=weights,
            vocabulary=vocabulary,
            hidden=hidden,
            queries=heads * per_head,
            keys=(config.get("num_key_value_heads") or heads) * per_head,
            context=_first(config, "max_position_embeddings", "n_positions"),
        )

    @property
    def size(self) -> int:
        """Elements of all weights."""
        return sum(weight.size for weight in self.weights)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all weights in their files."""
        return sum(weight.stored_bytes for weight in self.weights)

    @cached_property
    def layers(self) -> int:
        """Number of layers."""
        return len({weight.layer for weight in self.weights} - {None})

    @cached_property
    def first_layer(self) -> tuple[WeightShape, ...]:
        """The weights of one layer; the others are like it."""
        return tuple(weight for weight in self.weights if weight.layer == 0)

    @cached_property
    def linear(self) -> tuple[WeightShape, ...]:
        """The matrices of linear layers, but for the output layer."""
        return tuple(weight for weight in self.weights if weight.layer is not None and len(weight.shape) == 2)

    @property
    def norms(self) -> int:
        """Norms of a layer that are as wide as it."""
        return sum(weight.shape == (self.hidden,) and not weight.name.endswith("bias") for weight in self.first_layer)

    @property
    def norms_heads(self) -> bool:
        """Whether queries and keys have norms of their own."""
        return any(weight.is_in("q_norm") for weight in self.first_layer)

    @property
    def inner(self) -> tuple[int, int]:
        """The width inside a layer's feed-forward part, and the number of matrices that lead into it: 2 with a gate."""
        matrices = [
            w for w in self.first_layer if len(w.shape) == 2 and "attn" not in w.name and "attention" not in w.name
        ]
        if not matrices:
            return 0, 0
        leading = max(1, len(matrices) - 1)
        total = sum(weight.size for weight in matrices) // self.hidden  # of all of them, some may be one matrix
        return total // (leading + 1), leading


def hidden_size(folder: Path) -> int | None:
    """The width of what a model's layers take and give, where its configuration says it. Raises InputError."""
    width = _first(_config(folder), "hidden_size", "n_embd", "d_model")
    return width if isinstance(width, int) else None


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"no model is in {folder}")
    try:
        config = read_json(path)
        return dict(config.get("text_config") or config)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _first(config: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of these names that the configuration has."""
    return next((config[name] for name in names if config.get(name)), None)


def _weights(folder: Path, *, is_tied: bool) -> Iterator[WeightShape]:
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise InputError(f"no *.safetensors weights are in {folder}")
    for path in paths:
        for name, entry in _header(path).items():
            if name == "__metadata__" or (is_tied and name == "lm_head.weight"):
                continue
            try:
                start, end = entry["data_offsets"]
                yield WeightShape(name, tuple(map(int, entry["shape"])), end - start)
            except (KeyError, TypeError, ValueError):
                raise InputError(f"{path}: its header says nothing of the shape of {name}") from None


def _header(path: Path) -> dict[str, Any]:
    """The JSON at the beginning of a safetensors file, whose length is in the eight bytes before it."""
    try:
        with open_regular(path) as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            return dict(parse_json(stream.read(length), _LONGEST_HEADER))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from None
