"""A state travels as bytes and comes back the same; what is not such a state is refused before it is used."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save

from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import Manifest, TrainableState

SHAPES = st.dictionaries(
    st.text(min_size=1, max_size=20).filter(lambda name: name.isprintable() and name != "__metadata__"),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    min_size=1,
    max_size=4,
)


@st.composite
def states(draw: Any) -> TrainableState:
    manifest = Manifest.of(draw(SHAPES))
    return TrainableState(manifest, draw(hnp.arrays(np.float32, manifest.size)))


def state_of(**tensors: Any) -> TrainableState:
    arrays = {name: np.asarray(values, dtype=np.float32) for name, values in tensors.items()}
    return TrainableState.from_arrays(arrays, Manifest.of({name: array.shape for name, array in arrays.items()}))


STATE = state_of(a=[[1.0, 2.0], [3.0, 4.0]], b=[5.0], c=6.0)


@settings(max_examples=100, deadline=None)
@given(states())
def test_a_state_comes_back_from_its_bytes_bit_for_bit(state: TrainableState) -> None:
    again = TrainableState.from_bytes(state.to_bytes(), state.manifest)
    assert again.buffer.tobytes() == state.buffer.tobytes()
    assert again.digest == state.digest
    assert len(state.to_bytes()) <= state.manifest.max_message_bytes


@settings(max_examples=100, deadline=None)
@given(SHAPES)
def test_a_manifest_comes_back_from_json_with_its_digest(shapes: dict[str, tuple[int, ...]]) -> None:
    manifest = Manifest.of(shapes)
    again = Manifest.from_json(json.loads(json.dumps(manifest.to_json())))
    assert again == manifest
    assert again.digest == manifest.digest


def test_the_order_in_which_tensors_are_named_does_not_matter() -> None:
    assert Manifest.of({"b": (1,), "a": (2,)}) == Manifest.of({"a": (2,), "b": (1,)})


@pytest.mark.parametrize("other", [{"a": (4,)}, {"a": (2, 2, 1)}, {"b": (2, 2)}, {"a": (2, 2), "b": ()}])
def test_another_layout_has_another_digest(other: dict[str, tuple[int, ...]]) -> None:
    assert Manifest.of(other).digest != Manifest.of({"a": (2, 2)}).digest


def test_one_changed_bit_changes_the_digest() -> None:
    bits = STATE.buffer.copy().view(np.uint32)
    bits[3] ^= 1
    assert TrainableState(STATE.manifest, bits.view(np.float32)).digest != STATE.digest


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(STATE.to_bytes()) - 1), st.integers(1, 255))
def test_a_corrupted_byte_is_refused_or_only_a_value_differs(position: int, change: int) -> None:
    data = bytearray(STATE.to_bytes())
    data[position] ^= change
    header = 8 + struct.unpack("<Q", STATE.to_bytes()[:8])[0]
    try:
        again = TrainableState.from_bytes(bytes(data), STATE.manifest)
    except ProtocolError:
        assert position < header
    else:
        assert again.manifest == STATE.manifest
        assert position < header or again.digest != STATE.digest


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(STATE.to_bytes()) - 1))
def test_bytes_cut_short_are_refused(length: int) -> None:
    with pytest.raises(ProtocolError):
        TrainableState.from_bytes(STATE.to_bytes()[:length], STATE.manifest)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        TrainableState.from_bytes(data, STATE.manifest)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"a": np.zeros((2, 2), "f4"), "b": np.zeros(1, "f4")}, "tensor 'c' is missing"),
        ({**dict(STATE.tensors()), "d": np.zeros(1, "f4")}, "unknown tensor 'd'"),
        ({**dict(STATE.tensors()), "a": np.zeros(4, "f4")}, r"tensor 'a' is float32 \(4,\), not float32 \(2, 2\)"),
        ({**dict(STATE.tensors()), "b": np.zeros(1, "f8")}, "tensor 'b' is float64"),
        ({**dict(STATE.tensors()), "b": np.zeros(1, "i4")}, "tensor 'b' is int32"),
    ],
)
def test_another_name_shape_or_type_is_refused_by_name(tensors: dict[str, Any], expected: str) -> None:
    with pytest.raises(ProtocolError, match=expected):
        TrainableState.from_bytes(save({name: np.asarray(value) for name, value in tensors.items()}), STATE.manifest)


def test_a_type_that_numpy_does_not_have_is_refused() -> None:
    header = json.dumps({"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    with pytest.raises(ProtocolError):
        TrainableState.from_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4, Manifest.of({"a": (2,)}))


def test_more_bytes_than_such_a_state_takes_are_refused_unread() -> None:
    with pytest.raises(ProtocolError, match="is more than a state of 6 parameters takes"):
        TrainableState.from_bytes(b"\0" * (STATE.manifest.max_message_bytes + 1), STATE.manifest)


def test_a_manifest_that_claims_the_earth_costs_no_memory() -> None:
    with pytest.raises(ProtocolError, match="of more than any model has"):
        Manifest.from_json([["a", [10**9, 10**9, 10**9]]])
    with pytest.raises(ProtocolError, match="tensor 'a'"):
        TrainableState.from_bytes(save({"a": np.zeros(1, "f4")}), Manifest.of({"a": (10**9, 10**3)}))


@pytest.mark.parametrize(
    "document",
    [
        None, {}, "ab", 3, [["a"]], [["a", 3]], [["a", "12"]], [[1, [2]]], [["a", [-1]]], [["a", [True]]],
        [["a", [1.0]]],
        [["a", [float("inf")]]], [["b", [1]], ["a", [1]]], [["a", [1]], ["a", [1]]], [["a", [None]]], ["ab"],
    ],
)  # fmt: skip
def test_what_is_no_manifest_is_refused(document: Any) -> None:
    with pytest.raises(ProtocolError, match="manifest"):
        Manifest.from_json(document)


def test_a_buffer_of_another_length_or_type_is_refused() -> None:
    with pytest.raises(ProtocolError, match="float32 vector of 6 elements"):
        TrainableState(STATE.manifest, np.zeros(5, "f4"))
    with pytest.raises(ProtocolError, match="not float64"):
        TrainableState(STATE.manifest, np.zeros(6, "f8"))  # type: ignore[arg-type]


def test_nan_and_infinity_are_seen() -> None:
    assert STATE.is_finite()
    for value in (np.nan, np.inf, -np.inf):
        assert not state_of(a=[1.0, value]).is_finite()
