"""The bf16 codec against PyTorch's bfloat16, and its mean against the value itself."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import Manifest, TrainableState
from strategies import bf16
from strategies.draws import PIECE, rounding_key
from strategies.selection import selection_of

KEY = rounding_key(0, "site", 1)


def state(values: np.ndarray) -> TrainableState:
    buffer = np.asarray(values, dtype=np.float32)
    return TrainableState(Manifest.of({"w": buffer.shape}), buffer)


def zeros_like(other: TrainableState) -> TrainableState:
    return TrainableState(other.manifest, np.zeros_like(other.buffer))


@given(st_numpy.arrays(np.float32, st.integers(1, 50), elements=st.floats(-(2.0**126), 2.0**126, width=32)))
def test_each_value_goes_to_one_of_its_two_bfloat16_neighbours(values: np.ndarray) -> None:
    trained = state(values)
    got = bf16.decode(bf16.encode(trained, zeros_like(trained), KEY), zeros_like(trained)).buffer
    assert np.array_equal(got, torch.from_numpy(got).bfloat16().float().numpy())
    assert (np.abs(got - values.astype(np.float64)) <= np.maximum(np.abs(values) * 2.0**-7, 2.0**-133)).all()


@given(st_numpy.arrays(np.float32, st.integers(1, 50), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_a_value_that_bfloat16_has_arrives_as_it_is(values: np.ndarray) -> None:
    exact = state(torch.from_numpy(values).bfloat16().float().numpy())
    received = bf16.decode(bf16.encode(exact, zeros_like(exact), KEY), zeros_like(exact))
    assert np.array_equal(received.buffer, exact.buffer)


@pytest.mark.parametrize("value", [1.0 + 2.0**-9, -(1.0 + 2.0**-9), 3.1e-5])
def test_the_mean_is_the_value(value: float) -> None:
    count = 200_000
    trained = state(np.full(count, value))
    received = bf16.decode(bf16.encode(trained, zeros_like(trained), KEY), zeros_like(trained)).buffer
    step = abs(value) * 2.0**-7
    assert abs(received.mean(dtype=np.float64) - trained.buffer[0]) < 5 * step / 2 / np.sqrt(count)


def test_a_change_is_added_to_what_both_ends_hold_and_the_rest_stays() -> None:
    rng = np.random.default_rng(0)
    size = PIECE + 1000
    reference = state(rng.normal(size=size))
    trained = state(reference.buffer + 1e-3 * rng.normal(size=size).astype(np.float32))
    selection = selection_of(Manifest.of({"w": (size,)}), 0.25, seed=0, round=1)
    assert selection is not None
    data = bf16.encode(trained, reference, KEY, selection)
    received = bf16.decode(data, reference, selection).buffer
    chosen = selection.piece(0, size)
    assert len(data) == 2 * chosen.sum()
    assert np.array_equal(received[~chosen], reference.buffer[~chosen])
    np.testing.assert_allclose(received[chosen], trained.buffer[chosen], atol=5e-3 * 2.0**-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_at_both_ends(bad: float) -> None:
    clean = state(np.zeros(3))
    with pytest.raises(ProtocolError, match="NaN, infinite"):
        bf16.encode(state(np.array([0, bad, 0])), clean, KEY)
    half = (np.array([0, bad, 0], dtype=np.float32).view(np.uint32) >> 16).astype("<u2")
    with pytest.raises(ProtocolError, match="NaN or infinite"):
        bf16.decode(half.tobytes(), clean)


def test_what_could_round_to_infinity_is_refused_and_the_largest_that_cannot_is_not() -> None:
    clean = state(np.zeros(1))
    largest = torch.finfo(torch.bfloat16).max
    assert bf16.decode(bf16.encode(state(np.array([largest])), clean, KEY), clean).buffer[0] == largest
    with pytest.raises(ProtocolError, match="too large"):
        bf16.encode(state(np.array([np.nextafter(np.float32(largest), np.float32(np.inf))])), clean, KEY)


@pytest.mark.parametrize("length", [0, 5, 7, 8])
def test_another_length_is_refused(length: int) -> None:
    with pytest.raises(ProtocolError, match=f"takes 6 bytes, not {length}"):
        bf16.decode(bytes(length), state(np.zeros(3)))
