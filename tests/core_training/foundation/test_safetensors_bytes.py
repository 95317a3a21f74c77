"""The safetensors format in memory: the library's bytes, its reading, and bytes that are no such file."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from core_training.foundation.safetensors_bytes import header_of, views_of

TENSORS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array(3.5, dtype=np.float32),
    'ü "quoted" \\ name': np.zeros((0, 4), dtype=np.float32),
    "z": np.arange(7, dtype=np.float32),
}


def test_what_is_written_is_what_the_library_writes() -> None:
    shapes = [(name, tensor.shape) for name, tensor in sorted(TENSORS.items())]
    written = header_of(shapes) + b"".join(TENSORS[name].tobytes() for name, _ in shapes)
    assert written == save(TENSORS)
    assert {name: tensor.tolist() for name, tensor in load(written).items()} == {
        name: tensor.tolist() for name, tensor in TENSORS.items()
    }


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64, np.int8, np.uint8, np.bool_])
def test_what_the_library_writes_is_read_without_a_copy(dtype: Any) -> None:
    tensors = {name: tensor.astype(dtype) for name, tensor in TENSORS.items()}
    data = save(tensors, metadata={"format": "np"})
    views = views_of(data)
    assert views.keys() == tensors.keys()
    for name, view in views.items():
        assert view.dtype == dtype
        np.testing.assert_array_equal(view, tensors[name])
        assert view.size == 0 or np.shares_memory(view, np.frombuffer(data, np.uint8))


def file_of(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def tensor(begin: Any = 0, end: Any = 4, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        b"\0" * 64,
        file_of({}, length=2**63),
        file_of({}, length=100),
        file_of(b"[1"),
        file_of([1]),
        file_of(b"[" * 10_000),
        file_of(b'{"a": ' + b"9" * 5000 + b"}"),
        file_of({"a": 1}),
        file_of({"a": {}}),
        file_of({"a": tensor(shape=[-1])}, b"1234"),
        file_of({"a": tensor(shape=[True])}, b"1234"),
        file_of({"a": tensor(shape=[1.0])}, b"1234"),
        file_of({"a": tensor(shape=[2**40, 2**40])}, b"1234"),
        file_of({"a": tensor(shape=[2**62] * 100_000)}, b"1234"),
        file_of({"a": tensor(begin=-4)}, b"1234"),
        file_of({"a": tensor(end=8)}, b"1234"),
        file_of({"a": tensor(4, 8)}, b"12345678"),
        file_of({"a": tensor()}, b"12345678"),
        file_of({"a": tensor()}, b"12"),
        file_of({"a": tensor(), "b": tensor()}, b"1234"),
        file_of({"a": tensor(), "b": tensor(2, 6)}, b"123456"),
        file_of({"a": tensor(dtype="F8_E5M2", end=1)}, b"1"),
        file_of({"a": tensor(dtype=["F32"])}, b"1234"),
    ],
)
def test_bytes_that_are_no_file_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"header|tensor|bytes"):
        views_of(data)
