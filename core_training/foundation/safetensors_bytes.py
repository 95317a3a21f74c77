"""The safetensors format in memory, without copies: tensors as views of the bytes, a buffer with its header before it.

The library's functions for bytes copy each tensor once and twice, which for a state of many gigabytes is what a process
has no room for. The format is a length, a header in JSON and the tensors' bytes:
https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from core_training.foundation.bounded_reading import ForeignTextError, parse_json

MOST_HEADER_BYTES = 100_000_000
"""The longest header that the library reads."""

_LENGTH_BYTES = 8
_MOST_DIMENSIONS = 16
"""Of one tensor. Python multiplies sizes without overflow: of many, that would take hours."""

_DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BOOL": "|b1"},
    **{f"I{bits}": f"<i{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"<u{bits // 8}" for bits in (8, 16, 32, 64)},
}


def header_of(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> bytes:
    """What comes before the bytes of float32 tensors of these names and shapes, which follow each other."""
    header, end = {}, 0
    for name, shape in shapes:
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def views_of(data: bytes | memoryview) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a file, each a view of `data`. Raises ValueError for bytes that are no such file."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    start = _LENGTH_BYTES + length
    if len(data) < _LENGTH_BYTES or length > MOST_HEADER_BYTES or start > len(data):
        raise ValueError("its header is longer than the file")
    try:
        header = parse_json(bytes(data[_LENGTH_BYTES:start]), MOST_HEADER_BYTES)
    except ForeignTextError as error:
        raise ValueError(f"its header is {error}") from None
    if not isinstance(header, dict):
        raise ValueError("its header names no tensors")
    header.pop("__metadata__", None)
    views, end = {}, 0
    for name, tensor in sorted(header.items(), key=lambda one: _begin_of(*one)):
        dtype, shape, (begin, after) = _read(name, tensor)
        if begin != end:
            raise ValueError(f"tensor '{name}' does not begin where the one before it ends")
        count, end = math.prod(shape), after
        if after - begin != count * dtype.itemsize or start + after > len(data):
            raise ValueError(f"tensor '{name}' has other bytes than its shape takes")
        views[name] = np.frombuffer(data, dtype, count, start + begin).reshape(shape)
    if start + end != len(data):
        raise ValueError("there are bytes after the last tensor")
    return views


def _begin_of(name: str, tensor: Any) -> tuple[int, int]:
    begin, after = _read(name, tensor)[2]
    return begin, after


def _read(name: str, tensor: Any) -> tuple[np.dtype[Any], tuple[int, ...], tuple[int, int]]:
    """A tensor's type, shape and place, of its entry in the header."""
    match tensor:
        case {"dtype": str(kind), "shape": [*shape], "data_offsets": [int(begin), int(after)]} if len(
            shape
        ) <= _MOST_DIMENSIONS and _are_sizes([*shape, begin, after]):
            if kind not in _DTYPES:
                raise ValueError(f"tensor '{name}' is {kind}, not float32")
            return np.dtype(_DTYPES[kind]), tuple(shape), (begin, after)
    raise ValueError(f"tensor '{name}' is described in other words")


def _are_sizes(numbers: list[Any]) -> bool:
    return all(type(number) is int and 0 <= number < 2**63 for number in numbers)
