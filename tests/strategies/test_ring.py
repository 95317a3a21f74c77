"""The ring codec against closed forms, exact integers and a reference of a few lines."""

import hashlib
import math
import tracemalloc
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_training.foundation.errors import InputError, NarrowScaleError, ProtocolError
from core_training.foundation.state import Manifest, TrainableState
from strategies.draws import PIECE, draws, rounding_key
from strategies.ring import Outcome, RingCodec, RingSum
from strategies.ring_scale import LEVELS, Scale
from strategies.selection import selection_of

MANIFEST = Manifest.of({"a": (3, 4), "b": (7,), "c": (2,)})
CLIP = 0.3
SCALE = Scale(exponents=[0, 3, 5], weight_cap=256)
LIMITS = np.repeat([CLIP, CLIP / 8, CLIP / 32], [12, 7, 2])
BITS = [16, 24, 32]
bits_of_rings = st.sampled_from(BITS)


def state(values: np.ndarray, manifest: Manifest = MANIFEST) -> TrainableState:
    return TrainableState(manifest, np.asarray(values, dtype=np.float32))


START = state(np.linspace(-1, 1, MANIFEST.size))
STILL = state(np.zeros(MANIFEST.size))


def codec(bits: int, sites: int, figures: int = 0, scale: Scale = SCALE) -> RingCodec:
    return RingCodec(MANIFEST, bits, sites, CLIP, scale, figures=figures)


def total(ring: RingCodec, vectors: list, start: TrainableState = STILL) -> Outcome:
    """What the sum of these says after they went over the wire."""
    ring_sum = RingSum(ring)
    for vector in vectors:
        ring_sum.add(ring.from_bytes(ring.to_bytes(vector)))
    return ring_sum.result(start)


@given(bits_of_rings, st.integers(2, 128), st.sampled_from([-1.0, 1.0]), st.sampled_from([1.0, 1.5, 1e6]))
def test_no_sum_wraps_round_when_all_sites_are_at_the_limit(bits: int, sites: int, sign: float, beyond: float) -> None:
    ring = codec(bits, sites)
    extreme = state(sign * beyond * LIMITS)
    vectors = [ring.encode(extreme, STILL, 256, [], rounding_key(0, str(site), 1)) for site in range(sites)]
    np.testing.assert_allclose(total(ring, vectors).state.buffer, sign * LIMITS, rtol=1e-6)


@given(bits_of_rings, st.integers(1, 20), st.data())
def test_weights_and_figures_add_up_exactly(bits: int, sites: int, data: st.DataObject) -> None:
    largest = 2**63 // sites - 1
    ring = codec(bits, sites, figures=3)
    number = st.integers(-largest, largest) | st.sampled_from([-largest, 0, largest])
    figures = data.draw(st.lists(st.lists(number, min_size=3, max_size=3), min_size=1, max_size=sites))
    weights = data.draw(st.lists(st.integers(1, 1000), min_size=len(figures), max_size=len(figures)))
    outcome = total(ring, [ring.encode(STILL, STILL, w, f, b"k" * 16) for w, f in zip(weights, figures, strict=True)])
    assert outcome.figures == [sum(column) for column in zip(*figures, strict=True)]
    assert outcome.weight == sum(min(weight, 256) for weight in weights)
    assert outcome.capped == sum(weight > 256 for weight in weights)
    assert outcome.count == len(weights)


@given(bits_of_rings, st.integers(1, 40), st.sampled_from([1.0, 0.5]), st.integers(0, 2**32 - 1))
def test_a_sum_is_the_weighted_mean_of_the_clipped_changes_within_a_step_of_each_site(
    bits: int, sites: int, keep: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    selection = selection_of(MANIFEST, keep, seed, 1)
    ring = RingCodec(MANIFEST, bits, sites, CLIP, SCALE, selection=selection)
    trained = [state(START.buffer + LIMITS * rng.standard_normal(MANIFEST.size)) for _ in range(sites)]
    weights = rng.integers(1, 400, size=sites).tolist()
    vectors = [
        ring.encode(one, START, weight, [], rounding_key(seed, str(site), 1))
        for site, (one, weight) in enumerate(zip(trained, weights, strict=True))
    ]
    outcome = total(ring, vectors, START)
    chosen = np.full(MANIFEST.size, True) if selection is None else selection.piece(0, MANIFEST.size)
    changes = [np.where(chosen, one.buffer.astype(np.float64) - START.buffer, 0) for one in trained]
    counted = np.minimum(weights, 256)
    mean = np.average([np.clip(change, -LIMITS, LIMITS) for change in changes], axis=0, weights=counted)
    step = LIMITS / (2 ** (bits - math.ceil(math.log2(sites)) - 1) - 1) * 256 / counted.sum()
    assert (np.abs(outcome.state.buffer - (START.buffer + mean)) <= sites * step + 2.0**-22).all()
    assert outcome.saturated == sum(int((np.abs(change) > LIMITS).sum()) for change in changes)
    assert np.array_equal(outcome.state.buffer[~chosen], START.buffer[~chosen])
    tops = [[np.abs(c[part]).max() for c in changes] for part in (slice(0, 12), slice(12, 19), slice(19, 21))]
    if selection is None:
        for row, peaks, limit in zip(outcome.levels, tops, LIMITS[[0, 12, 19]], strict=False):
            above = [sum(peak > limit / 2**level for peak in peaks) for level in range(5)] + [sites]
            assert np.cumsum(row).tolist() == above


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("change", [0.1234567, -0.1234567, 1e-7])
def test_the_mean_over_many_roundings_is_the_change(bits: int, change: float) -> None:
    count = 100_000
    manifest = Manifest.of({"w": (count,)})
    ring = RingCodec(manifest, bits, 16, CLIP, Scale(exponents=[0], weight_cap=256))
    start = state(np.zeros(count), manifest)
    trained = state(np.full(count, change), manifest)
    outcome = ring.decode(ring.encode(trained, start, 100, [], rounding_key(0, "site", 1)), 1, start)
    step = CLIP / (2 ** (bits - 5) - 1) * 2.56
    got = outcome.state.buffer.mean(dtype=np.float64)
    assert abs(got - trained.buffer[0]) < 5 * step / 2 / math.sqrt(count) + abs(change) * 2.0**-25


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_change_far_below_a_step_leans_to_neither_side(sign: int) -> None:
    manifest = Manifest.of({"w": (1_000_000,)})
    ring = RingCodec(manifest, 16, 16, CLIP, Scale(exponents=[0], weight_cap=256))
    start, trained = (state(np.full(manifest.size, value), manifest) for value in (0.0, sign * 1e-12))
    vector = ring.encode(trained, start, 100, [], rounding_key(0, "site", 1))
    assert not vector[: manifest.size].any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("keep", [1.0, 0.3])
def test_a_vector_is_what_exact_arithmetic_on_each_value_gives(bits: int, keep: float) -> None:
    """Over several pieces, against rational numbers: floor(change · weight/cap · q/c + u) modulo 2^bits."""
    manifest = Manifest.of({"big": (PIECE + 300,), "small": (5,)})
    rng = np.random.default_rng(1)
    selection = selection_of(manifest, keep, 5, 1)
    # Changes and a limit that are few bits long, so that float64 rounds nothing.
    change = rng.integers(-(2**12), 2**12, size=manifest.size) / 2.0**13
    change[:200] *= 2  # beyond the limit, some of them
    trained, start = state(change, manifest), state(np.zeros(manifest.size), manifest)
    ring = RingCodec(manifest, bits, 4, 0.5, Scale(exponents=[0, 1], weight_cap=64), selection=selection)
    key = rounding_key(5, "site", 1)
    vector = ring.encode(trained, start, 48, [], key)
    chosen = np.full(manifest.size, True) if selection is None else selection.piece(0, manifest.size)
    places = [*range(0, 400, 7), *range(PIECE - 40, manifest.size)]
    pieces = [(0, PIECE), (PIECE, PIECE + 300), (PIECE + 300, PIECE + 305)]
    drawn = np.zeros(manifest.size, dtype=np.int64)
    for first, stop in pieces:
        drawn[first:stop][chosen[first:stop]] = draws(key, first, int(chosen[first:stop].sum()))
    position = np.cumsum(chosen) - 1
    for place in filter(lambda place: chosen[place], places):
        limit = Fraction(1, 2) if place < PIECE + 300 else Fraction(1, 4)
        clipped = min(max(Fraction(float(change[place])), -limit), limit)
        u = Fraction(2 * int(drawn[place]) + 1, 2**17)
        exact = math.floor(clipped * Fraction(48, 64) * (2 ** (bits - 3) - 1) / limit + u)
        ring_bits = 16 if bits == 16 else 32
        assert int(vector[position[place]]) == exact % 2**ring_bits


def test_the_vector_is_the_same_on_every_machine() -> None:
    rng = np.random.Generator(np.random.PCG64(7))
    trained = state(rng.integers(-1000, 1000, size=MANIFEST.size) / np.float32(3001))
    digests = {}
    for bits in BITS:
        ring = codec(bits, 5, figures=1)
        vector = ring.encode(trained, STILL, 77, [-9], rounding_key(1, "north", 3))
        digests[bits] = hashlib.sha256(ring.to_bytes(vector)).hexdigest()[:16]
    assert digests == {16: "6a71dafb5867d50e", 24: "a738aeb2b522ae6d", 32: "2a128f5c7dcb6681"}


@pytest.mark.parametrize("bits", BITS)
def test_the_state_does_not_show_in_which_order_the_updates_came(bits: int) -> None:
    rng = np.random.default_rng(3)
    ring = codec(bits, 4)
    trained = [state(START.buffer + 0.1 * rng.standard_normal(MANIFEST.size)) for _ in range(4)]
    vectors = [ring.encode(one, START, 100 + i, [], rounding_key(0, str(i), 1)) for i, one in enumerate(trained)]
    digests = {total(ring, list(order), START).state.digest for order in permutations(vectors)}
    assert len(digests) == 1


@pytest.mark.parametrize("bits", BITS)
def test_masks_that_cancel_leave_the_plain_outcome(bits: int) -> None:
    rng = np.random.default_rng(4)
    ring = codec(bits, 2, figures=2)
    plain = [ring.encode(START, STILL, 50 + i, [i, -i], rounding_key(0, str(i), 1)) for i in range(2)]
    mask = rng.integers(0, np.iinfo(ring.dtype).max, size=ring.length, dtype=ring.dtype, endpoint=True)
    masked = [plain[0] + mask, plain[1] - mask]
    expected, got = total(ring, plain), total(ring, masked)
    assert got.state.digest == expected.state.digest
    assert (got.weight, got.figures, got.levels) == (expected.weight, expected.figures, expected.levels)
    # Where the receiver keeps 32 bits of a ring of 24, those above say nothing.
    assert ring.decode(masked[0] + masked[1], 2, STILL).state.digest == expected.state.digest


@pytest.mark.parametrize(("bits", "per_value"), [(16, 2), (24, 3), (32, 4)])
def test_a_vector_travels_in_as_many_bytes_as_its_ring_has(bits: int, per_value: int) -> None:
    ring = codec(bits, 3, figures=2)
    vector = ring.encode(START, STILL, 5, [1, 2], b"k" * 16)
    data = ring.to_bytes(vector)
    assert len(data) == ring.payload_bytes == per_value * ring.length
    assert ring.from_bytes(data).dtype == ring.dtype
    assert np.array_equal(ring.from_bytes(data), vector & (2**bits - 1))
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(ProtocolError, match=f"takes {len(data)} bytes, not {len(wrong)}"):
            ring.from_bytes(wrong)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_change_that_is_not_finite_is_refused_by_name_whether_it_travels_or_not(bad: float) -> None:
    values = START.buffer.copy()
    values[13] = bad
    for selection in (None, selection_of(MANIFEST, 0.01, 0, 1)):
        ring = RingCodec(MANIFEST, 16, 3, CLIP, SCALE, selection=selection)
        with pytest.raises(ProtocolError, match="change of 'b' holds NaN or infinite"):
            ring.encode(state(values), START, 1, [], b"k" * 16)


@pytest.mark.parametrize(("size", "most"), [(70, 64), (6400, 64), (10_000, 100), (50_000, 500)])
def test_a_scale_may_cut_one_percent_of_a_tensor_or_64_values_and_no_more(size: int, most: int) -> None:
    manifest = Manifest.of({"cut": (size,), "whole": (1_000_000,)})
    ring = RingCodec(manifest, 16, 3, CLIP, Scale(exponents=[0, 0], weight_cap=4))
    values = np.zeros(manifest.size)
    values[:most] = 2 * CLIP
    assert ring.encode(state(values, manifest), state(0 * values, manifest), 1, [], b"k" * 16).size == ring.length
    values[most] = -2 * CLIP
    with pytest.raises(NarrowScaleError, match="would cut too many values"):
        ring.encode(state(values, manifest), state(0 * values, manifest), 1, [], b"k" * 16)


def test_a_scale_may_cut_one_percent_of_all_values_though_no_tensor_shows_it() -> None:
    manifest = Manifest.of({f"small {number}": (64,) for number in range(10)})
    ring = RingCodec(manifest, 16, 3, CLIP, Scale(exponents=[0] * 10, weight_cap=4))
    values = np.zeros(manifest.size)
    values[:64] = 2 * CLIP
    assert ring.encode(state(values, manifest), state(0 * values, manifest), 1, [], b"k" * 16).size == ring.length
    values[64] = 2 * CLIP
    with pytest.raises(NarrowScaleError, match="would cut too many values"):
        ring.encode(state(values, manifest), state(0 * values, manifest), 1, [], b"k" * 16)


def test_what_must_not_enter_a_sum_is_refused() -> None:
    ring = codec(16, 4, figures=1)
    other = Manifest.of({"a": (21,)})
    with pytest.raises(ProtocolError, match="another manifest"):
        ring.encode(state(np.zeros(21), other), STILL, 1, [0], b"k" * 16)
    with pytest.raises(ProtocolError, match="weight 0 is not a positive number"):
        ring.encode(START, STILL, 0, [0], b"k" * 16)
    for figures in ([], [0, 0], [2**61], [-(2**61)]):
        with pytest.raises(ProtocolError, match=r"takes 1 figures below 2\^63 / sites$"):
            ring.encode(START, STILL, 1, figures, b"k" * 16)
    with pytest.raises(ProtocolError, match="not uint32"):
        RingSum(ring).add(np.zeros(ring.length, dtype=np.uint32))
    with pytest.raises(ProtocolError, match="not uint16"):
        RingSum(ring).add(np.zeros(ring.length - 1, dtype=np.uint16))


@pytest.mark.parametrize("bits", BITS)
def test_a_sum_with_garbage_in_it_or_of_other_sites_is_refused(bits: int) -> None:
    rng = np.random.default_rng(5)
    ring = codec(bits, 8)
    vectors = [ring.encode(START, STILL, 100, [], rounding_key(0, str(site), 1)) for site in range(8)]
    garbage = rng.integers(0, np.iinfo(ring.dtype).max, size=ring.length, dtype=ring.dtype, endpoint=True)
    tail = ring.length - MANIFEST.size
    head_only = np.concatenate([garbage[:-tail], vectors[0][-tail:]])
    for bad in (garbage, head_only):
        with pytest.raises(ProtocolError, match="some site sent something else"):
            total(ring, [*vectors[1:], bad])
    sum_of_seven = np.sum(vectors[:7], axis=0, dtype=ring.dtype)
    for count in (6, 8):
        with pytest.raises(ProtocolError, match="was left out"):
            ring.decode(sum_of_seven, count, STILL)
    assert ring.decode(sum_of_seven, 7, STILL).count == 7


def test_no_sum_whatever_its_sites_sent_moves_a_value_beyond_its_limit() -> None:
    """With a small weight, the last bit of each value is worth more than the limit."""
    ring = codec(16, 4)
    forged = ring.encode(STILL, STILL, 1, [], b"k" * 16)
    for sign in (1, -1):
        forged[: MANIFEST.size] = sign * 33 % 2**16  # the bound is (2^13 - 1) / 256 = 31 and one for rounding
        with pytest.raises(ProtocolError, match="larger than its sites can have made it"):
            ring.decode(forged, 1, STILL)
        forged[: MANIFEST.size] = sign * 32 % 2**16
        np.testing.assert_array_equal(ring.decode(forged, 1, STILL).state.buffer, sign * LIMITS.astype(np.float32))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("weight", "saturated", "fits"),
    [
        (1, 0, True),
        (256, MANIFEST.size, True),
        (0, 0, False),
        (-1, 0, False),
        (257, 0, False),
        (1, MANIFEST.size + 1, False),
        (1, -1, False),
    ],
)
def test_a_sum_has_no_more_weight_and_no_more_cut_values_than_its_sites_can_have(
    bits: int, weight: int, saturated: int, fits: bool
) -> None:
    ring = codec(bits, 4)
    forged = ring.encode(STILL, STILL, 1, [], b"k" * 16)
    counts = [limb for number in (weight, saturated) for limb in ring._split(number)]
    forged[-len(counts) :] = counts
    if fits:
        outcome = ring.decode(forged, 1, STILL)
        assert (outcome.weight, outcome.saturated) == (weight, saturated)
    else:
        with pytest.raises(ProtocolError, match="is not one of updates"):
            ring.decode(forged, 1, STILL)


@pytest.mark.parametrize("row", range(4))
def test_a_sum_has_each_site_on_one_level_of_a_tensor_at_most_and_on_one_of_the_weight(row: int) -> None:
    ring = codec(16, 4)
    vectors = [ring.encode(START, STILL, 1, [], b"k" * 16) for _ in range(3)]
    assert total(ring, vectors).count == 3
    vectors[0][MANIFEST.size + LEVELS * row] += 1
    with pytest.raises(ProtocolError, match="is not one of updates"):
        total(ring, vectors)


def test_a_ring_without_room_and_a_scale_of_another_state_are_refused() -> None:
    assert codec(16, 2**14).length > 0
    with pytest.raises(InputError, match="ring16 adds up 16384 sites at most, not 16385"):
        codec(16, 2**14 + 1)
    with pytest.raises(ProtocolError, match="the scale is of 2 tensors; the run has 3"):
        codec(16, 4, scale=Scale(exponents=[0, 0], weight_cap=1))


def test_coding_takes_no_second_state_in_memory() -> None:
    manifest = Manifest.of({"w": (2_000_000,)})
    start, trained = (state(np.full(manifest.size, value), manifest) for value in (0.0, 0.01))
    ring = RingCodec(manifest, 16, 16, CLIP, Scale(exponents=[0], weight_cap=4))
    tracemalloc.start()
    vector = ring.encode(trained, start, 3, [], b"k" * 16)
    beyond = tracemalloc.get_traced_memory()[1] - vector.nbytes
    tracemalloc.reset_peak()
    held = tracemalloc.get_traced_memory()[0]
    outcome = ring.decode(vector, 1, start)
    beyond_decoding = tracemalloc.get_traced_memory()[1] - held - outcome.state.buffer.nbytes
    tracemalloc.stop()
    assert beyond < 4e6
    assert beyond_decoding < 4e6
