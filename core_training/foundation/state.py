"""The tensors that travel: one contiguous float32 buffer and the manifest that says what lies where in it.

Knows nothing of models, networks or rounds. The wire and disk format is safetensors, whose header is plain JSON: what
arrives is checked against the manifest the receiver already holds before a byte of it is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core_training.foundation.errors import ProtocolError
from core_training.foundation.safetensors_bytes import header_of, views_of

Float32Array = npt.NDArray[np.float32]

# The safetensors header of a state: about 100 bytes a tensor. The slack keeps the bound honest for long names.
_HEADER_BYTES_PER_TENSOR = 400
_HEADER_BYTES_FIXED = 4096

# What somebody else's manifest may say; a model of a trillion parameters has less.
_MOST_TENSORS = 10**6
_MOST_ELEMENTS = 2**42
_MOST_DIMENSIONS = 16
_LONGEST_NAME = 1000


@dataclass(frozen=True)
class TensorSpec:
    """Name and shape of one trainable tensor."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Manifest:
    """The tensors of a trainable state, in buffer order (sorted by name)."""

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> Manifest:
        return cls(tuple(TensorSpec(name, tuple(shapes[name])) for name in sorted(shapes)))

    @classmethod
    def from_json(cls, document: Any) -> Manifest:
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        if not isinstance(document, list) or not all(_is_tensor(item) for item in document):
            raise ProtocolError("the manifest is not a list of [name, [size, …]] pairs")
        if len(document) > _MOST_TENSORS or sum(math.prod(shape) for _, shape in document) > _MOST_ELEMENTS:
            raise ProtocolError("the manifest is of more than any model has")
        names = [name for name, _ in document]
        if names != sorted(set(names)):
            raise ProtocolError("the manifest's names must be sorted and unique")
        return cls(tuple(TensorSpec(name, tuple(shape)) for name, shape in document))

    def to_json(self) -> list[list[Any]]:
        return [[spec.name, list(spec.shape)] for spec in self.tensors]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON form: two parties with one digest mean the same buffer layout."""
        return hashlib.sha256(json.dumps(self.to_json(), separators=(",", ":")).encode()).hexdigest()

    @cached_property
    def size(self) -> int:
        """Number of elements of the whole buffer."""
        return sum(spec.size for spec in self.tensors)

    @property
    def max_message_bytes(self) -> int:
        """The most bytes a serialised state with this manifest can take."""
        return 4 * self.size + _HEADER_BYTES_PER_TENSOR * len(self.tensors) + _HEADER_BYTES_FIXED


@dataclass(frozen=True)
class TrainableState:
    """A value of every trainable tensor. `buffer` is a C-contiguous float32 vector of `manifest.size` elements."""

    manifest: Manifest
    buffer: Float32Array

    def __post_init__(self) -> None:
        if self.buffer.dtype != np.float32 or self.buffer.shape != (self.manifest.size,):
            raise ProtocolError(
                f"a state with this manifest is a float32 vector of {self.manifest.size} elements, "
                f"not {self.buffer.dtype} {self.buffer.shape}"
            )

    def tensors(self) -> Iterator[tuple[str, Float32Array]]:
        """Each tensor's name and a view of its values, shaped as in the manifest."""
        offset = 0
        for spec in self.manifest.tensors:
            yield spec.name, self.buffer[offset : offset + spec.size].reshape(spec.shape)
            offset += spec.size

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over the manifest digest and the little-endian bytes of the buffer."""
        hasher = hashlib.sha256(self.manifest.digest.encode())
        hasher.update(np.ascontiguousarray(self.buffer, dtype="<f4").data)
        return hasher.hexdigest()

    def is_finite(self) -> bool:
        """Whether no element is NaN or infinite."""
        return bool(np.isfinite(self.buffer).all())

    def to_bytes(self) -> bytes:
        """The state as one safetensors file."""
        return b"".join(self._parts())

    def write(self, path: Path) -> None:
        """Write the file of `to_bytes`, without holding it."""
        with path.open("wb") as file:
            for part in self._parts():
                file.write(part)

    def _parts(self) -> tuple[bytes, memoryview]:
        values = np.ascontiguousarray(self.buffer, dtype="<f4")
        return header_of((spec.name, spec.shape) for spec in self.manifest.tensors), values.data.cast("B")

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, manifest: Manifest) -> TrainableState:
        """Read `to_bytes` back.

        Raises ProtocolError, naming the tensor, when a name, shape or dtype differs from `manifest`, and when the
        bytes are no safetensors file or are more than such a state can take.
        """
        if len(data) > manifest.max_message_bytes:
            raise ProtocolError(f"{len(data)} bytes is more than a state of {manifest.size} parameters takes")
        try:
            arrays = views_of(data)
        except ValueError as error:
            raise ProtocolError(f"the bytes are not a safetensors file: {error}") from None
        return cls.from_arrays(arrays, manifest)

    @classmethod
    def on_bytes(cls, data: bytes | memoryview, manifest: Manifest) -> TrainableState:
        """As `from_bytes`, but no copy where the bytes are those of `to_bytes`: the state cannot be written to then."""
        header = header_of((spec.name, spec.shape) for spec in manifest.tensors)
        if data[: len(header)] != header or len(data) != len(header) + 4 * manifest.size:
            return cls.from_bytes(data, manifest)
        return cls(manifest, np.frombuffer(data, "<f4", manifest.size, len(header)))

    @classmethod
    def in_file(cls, path: Path, manifest: Manifest) -> TrainableState:
        """The state in a file that `to_bytes` wrote and nobody writes to: it may be removed, the state stays.

        Raises as `from_bytes`, and OSError.
        """
        with path.open("rb") as file:
            return cls.on_bytes(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), manifest)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], manifest: Manifest) -> TrainableState:
        """The state made of these tensors. Raises ProtocolError, naming the one that differs from `manifest`."""
        expected = {spec.name for spec in manifest.tensors}
        if unknown := sorted(arrays.keys() - expected):
            raise ProtocolError(f"unknown tensor '{unknown[0]}'")
        if missing := sorted(expected - arrays.keys()):
            raise ProtocolError(f"tensor '{missing[0]}' is missing")
        for spec in manifest.tensors:  # all of them, before memory is taken for what the manifest claims
            array = arrays[spec.name]
            if array.dtype != np.float32 or array.shape != spec.shape:
                raise ProtocolError(f"tensor '{spec.name}' is {array.dtype} {array.shape}, not float32 {spec.shape}")
        state = cls(manifest, np.empty(manifest.size, dtype=np.float32))
        for name, view in state.tensors():
            view[...] = arrays[name]
        return state


def _is_tensor(item: Any) -> bool:
    """Whether `item` is [name, [size, …]], as JSON gives it."""
    if not isinstance(item, list) or len(item) != 2:
        return False
    name, shape = item
    if not isinstance(name, str) or not isinstance(shape, list):
        return False
    is_bounded = len(name) <= _LONGEST_NAME and len(shape) <= _MOST_DIMENSIONS
    return is_bounded and all(type(n) is int and 0 <= n <= _MOST_ELEMENTS for n in shape)
