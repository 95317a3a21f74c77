"""The ring codec: a site's update as integers modulo 2¹⁶, 2²⁴ or 2³², whose sum is all that a round needs.

A vector holds the change of each value that travels, and behind them the site's weight, its figures and counts, so that
a mask over the vector hides all of it. Plain and masked runs make the same vectors: their sums agree bit for bit.
Knows nothing of masks or messages. Arithmetic is float64 value by value, the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from core_training.foundation.errors import InputError, NarrowScaleError, ProtocolError
from core_training.foundation.state import Manifest, TrainableState
from strategies.draws import PIECE, draws
from strategies.ring_scale import LEVELS, Levels, Scale, level_of
from strategies.selection import Selection

RingVector = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

_MOST_CUT = 0.01
_FEW = 64
"""The share of a tensor's and of all values, or their number where they are few, that a scale may cut."""

_INTEGER_BITS = 64
"""Bits of the weight and the figures: they are added modulo 2⁶⁴, as signed numbers."""


@dataclass(frozen=True)
class Outcome:
    """The content of a sum of vectors."""

    state: TrainableState
    """The start, moved by the weighted mean of the changes."""
    count: int
    """Sites in the sum."""
    weight: int
    """Their weights' sum."""
    saturated: int
    """Values that were cut at their limit, over all sites."""
    figures: list[int]
    """The sums of the sites' figures."""
    levels: Levels
    """The counts that `ring_scale.next_scale` reads."""

    @property
    def capped(self) -> int:
        """Sites whose weight was cut."""
        return self.levels[-1][0]


@dataclass(frozen=True)
class _Piece:
    """Values of one tensor, as places in the state's buffer."""

    tensor: int
    start: int
    stop: int


class RingCodec:
    """A writer and reader of one round's vectors.

    Parameters
    ----------
    bits : 16, 24 or 32, the ring's.
    sites : the most vectors that can be in a sum. A value has bits − ⌈log₂ sites⌉ bits, so that no sum wraps round.
    largest_change : see `ring_scale.largest_change`; tensor t is cut at c = largest_change · 2^−exponents[t].
    figures : how many whole numbers of the caller's ride along, to be added up exactly.

    Raises InputError for more sites than the ring can add up, ProtocolError for a scale of another state.
    """

    def __init__(
        self,
        manifest: Manifest,
        bits: int,
        sites: int,
        largest_change: float,
        scale: Scale,
        *,
        selection: Selection | None = None,
        figures: int = 0,
    ) -> None:
        # Headroom instead of saturation: the sum of all sites' values stays within the ring, whatever their signs.
        self._value_bits = bits - (sites - 1).bit_length()
        if self._value_bits < 2:
            raise InputError(f"privacy.codec: ring{bits} adds up {2 ** (bits - 2)} sites at most, not {sites}")
        if len(scale.exponents) != len(manifest.tensors):
            raise ProtocolError(f"the scale is of {len(scale.exponents)} tensors; the run has {len(manifest.tensors)}")
        self._manifest = manifest
        self._bits = bits
        self._sites = sites
        self._limits = [math.ldexp(largest_change, -exponent) for exponent in scale.exponents]
        self._cap = scale.weight_cap
        self._selection = selection
        self._figures = figures
        self._most = 2 ** (self._value_bits - 1) - 1
        """A value at its limit, with the whole weight."""
        self._values = manifest.size if selection is None else selection.count
        self._level_shape = (len(manifest.tensors) + 1, LEVELS)
        # A weight or figure may be larger than an element: it is cut into limbs, which have a value's headroom.
        self._limbs = -(-_INTEGER_BITS // self._value_bits)
        self.length = self._values + math.prod(self._level_shape) + self._limbs * (2 + figures)
        """Elements of a vector."""
        self.dtype: np.dtype[Any] = np.dtype(np.uint16 if bits == 16 else np.uint32)
        """24 bits are added in 32 and cut on the wire, as 2²⁴ divides 2³²."""
        self.payload_bytes = self.length * bits // 8
        """Bytes of a vector on the wire."""

    def encode(
        self, trained: TrainableState, start: TrainableState, weight: int, figures: Sequence[int], key: bytes
    ) -> RingVector:
        """The vector of one site's update. `key` (see `draws.rounding_key`) decides how its values are rounded.

        Raises ProtocolError for what must not enter a sum: NaN, infinite values, a weight below 1, and a change that is
        cut in many places. Of values that are all cut little but the sign is left, and in the sum of a few sites' signs
        each one's could be told. As others are told the reason, it says nothing of the values themselves.
        """
        if not self._manifest.digest == trained.manifest.digest == start.manifest.digest:
            raise ProtocolError("the state has another manifest than the run")
        if weight < 1:
            raise ProtocolError(f"weight {weight} is not a positive number")
        if len(figures) != self._figures or any(abs(figure) * self._sites >= 2**63 for figure in figures):
            raise ProtocolError(f"a vector takes {self._figures} figures below 2^63 / sites")  # which ones is no news
        counted = min(weight, self._cap)
        # Values are weighted before they are rounded: their sum is then the numerator of the weighted mean.
        bound = self._most * counted / self._cap
        vector = np.empty(self.length, dtype=self.dtype)
        peaks = [0.0] * len(self._limits)
        cut, sizes = [0] * len(self._limits), [0] * len(self._limits)
        place = 0
        for piece in self._pieces():
            change = trained.buffer[piece.start : piece.stop] - start.buffer[piece.start : piece.stop]
            # float32 does not hold the integers of a ring of 32 bits.
            change = change.astype(np.float64)
            peak = max(float(change.max()), -float(change.min()))
            if not math.isfinite(peak):
                name = self._manifest.tensors[piece.tensor].name
                raise ProtocolError(f"the change of '{name}' holds NaN or infinite values")
            # Over all values, not the chosen ones: in the next round, which this scales, others travel.
            peaks[piece.tensor] = max(peaks[piece.tensor], peak)
            if self._selection is not None:
                change = change[self._selection.piece(piece.start, piece.stop)]
            limit = self._limits[piece.tensor]
            if peak > limit:
                cut[piece.tensor] += int(np.count_nonzero(np.abs(change) > limit))
                np.clip(change, -limit, limit, out=change)
            change *= bound / limit
            # Up with the probability of what rounding down leaves out: the mean is the value (Gupta et al. 2015).
            noise = draws(key, piece.start, change.size).astype(np.float64)
            # Amid its step the noise averages ½ exactly, and is never 0 or 1: a whole number stays as it is.
            noise += 0.5
            noise *= 2.0**-16
            change += noise
            np.floor(change, out=change)
            # The cast to unsigned turns a negative number into its complement, which is how the ring writes it.
            vector[place : place + change.size] = change.astype(np.int32)
            sizes[piece.tensor] += change.size
            place += change.size
        saturated = sum(cut)
        # Each tensor by itself too: a small one could be cut throughout and not show among all values.
        for many, size in zip([*cut, saturated], [*sizes, place], strict=True):
            if many > max(_MOST_CUT * size, _FEW):
                raise NarrowScaleError(
                    "the scale would cut too many values of this site's update: more than an honest server's, unless "
                    "privacy.clip of the recipe is too small"
                )
        # `counted` rather than `weight`: the divisor must be the sum of what the values were multiplied by.
        self._write_rest(vector, [*peaks, weight], [counted, saturated, *figures])
        return vector

    def _write_rest(self, vector: RingVector, largest: Sequence[float], numbers: Sequence[int]) -> None:
        """Write what stands behind the values: the levels of each tensor's and the weight's largest, and numbers."""
        # One 1 in a row: the sum counts the sites on each level and names none.
        levels = np.zeros(self._level_shape, dtype=self.dtype)
        for row, (value, limit) in enumerate(zip(largest, [*self._limits, self._cap], strict=True)):
            if (level := level_of(value, limit)) is not None:
                levels[row, level] = 1
        vector[self._values : self._values + levels.size] = levels.ravel()
        vector[self._values + levels.size :] = [limb for number in numbers for limb in self._split(number)]

    def decode(self, total: RingVector, count: int, start: TrainableState) -> Outcome:
        """Read the sum of `count` sites' vectors.

        Raises ProtocolError for a sum that no such vectors have, as one of anything else is, but by rare chance.
        """
        # A ring of 24 bits is added in 32: the upper eight are none of its own.
        numbers = total[self._values :] if self._bits != 24 else total[self._values :] & 0xFFFFFF
        levels = numbers[: math.prod(self._level_shape)].reshape(self._level_shape).tolist()
        limbs = numbers[math.prod(self._level_shape) :].tolist()
        weight, saturated, *figures = [
            self._join(limbs[first : first + self._limbs]) for first in range(0, len(limbs), self._limbs)
        ]
        bound = self._most * weight // self._cap + count  # each site may have rounded up
        if (
            # Vectors as `encode` writes them meet all of this; a sum with a mask left in it hardly ever does.
            not count <= weight <= count * self._cap
            or not 0 <= saturated <= count * self._values
            # Each site has a weight, and so one level in the last row; a tensor that did not move has none.
            or sum(levels[-1]) != count
            or any(sum(row) > count for row in levels)
        ):
            raise ProtocolError("the sum is not one of updates: some site sent something else, or was left out")
        state = TrainableState(self._manifest, start.buffer.copy())
        place = 0
        for piece in self._pieces():
            chosen = None if self._selection is None else self._selection.piece(piece.start, piece.stop)
            size = piece.stop - piece.start if chosen is None else int(np.count_nonzero(chosen))
            mean = self._signed(total[place : place + size]).astype(np.float64)
            place += size
            if size and max(mean.max(), -mean.min()) > bound:
                raise ProtocolError("the sum is larger than its sites can have made it: some site sent something else")
            limit = self._limits[piece.tensor]
            mean *= limit / self._most * self._cap / weight
            np.clip(mean, -limit, limit, out=mean)  # it lies beyond by rounding only
            values = state.buffer[piece.start : piece.stop]
            if chosen is None:
                np.add(values, mean, out=values, casting="same_kind")
            else:
                values[chosen] = values[chosen] + mean
        return Outcome(state, count, weight, saturated, figures, levels)

    def to_bytes(self, vector: RingVector) -> bytes:
        """A vector as it travels: little endian, without the bits that a ring of 24 does not have."""
        plain = np.ascontiguousarray(vector, dtype=self.dtype.newbyteorder("<"))
        return plain.tobytes() if self._bits != 24 else plain.view(np.uint8).reshape(-1, 4)[:, :3].tobytes()

    def view(self, vector: RingVector) -> bytes | memoryview:
        """The same without a copy, where a vector lies in memory as it travels."""
        if self._bits == 24 or vector.dtype != self.dtype.newbyteorder("<"):
            return self.to_bytes(vector)
        return vector.view(np.uint8).data

    def from_bytes(self, data: bytes | memoryview) -> RingVector:
        """Read `to_bytes` back, without a copy (and so read-only) where that can be. Raises ProtocolError."""
        if len(data) != self.payload_bytes:
            raise ProtocolError(f"an update of this run takes {self.payload_bytes} bytes, not {len(data)}")
        return self.read_part(data)

    def read_part(self, data: bytes | memoryview) -> RingVector:
        """Read back what `to_bytes` made of any part of a vector: of as many values as are there."""
        if self._bits != 24:
            return np.frombuffer(data, dtype=self.dtype.newbyteorder("<")).astype(self.dtype, copy=False)
        parts = np.frombuffer(data, dtype=np.uint8).reshape(-1, 3)
        wide = np.zeros((len(parts), 4), dtype=np.uint8)
        wide[:, :3] = parts
        return wide.view("<u4").ravel().astype(np.uint32, copy=False)

    def _pieces(self) -> Iterator[_Piece]:
        """The whole state, cut where a tensor or a cache ends."""
        first = 0
        for number, spec in enumerate(self._manifest.tensors):
            for start in range(first, first + spec.size, PIECE):
                yield _Piece(number, start, min(start + PIECE, first + spec.size))
            first += spec.size

    def _signed(self, values: RingVector) -> npt.NDArray[np.int16] | npt.NDArray[np.int32]:
        """Ring elements as the numbers around 0 that they stand for."""
        if self._bits == 16:
            return values.view(np.int16)
        # Up and down again, so that bit 23 is spread as the sign.
        return (values << 8).view(np.int32) >> 8 if self._bits == 24 else values.view(np.int32)

    def _split(self, number: int) -> list[int]:
        """A whole number modulo 2⁶⁴ in limbs small enough that all sites' add up without wrapping round."""
        # Complements add up as the numbers do, so a negative figure needs no sign of its own.
        rest = number % 2**_INTEGER_BITS
        return [rest >> shift & (1 << self._value_bits) - 1 for shift in self._shifts]

    def _join(self, limbs: Sequence[int]) -> int:
        """The signed number whose limbs, or sums of limbs, these are."""
        # A sum of limbs may be wider than a limb: where the shifts overlap, this addition carries.
        number = sum(limb << shift for limb, shift in zip(limbs, self._shifts, strict=True))
        half: int = 2 ** (_INTEGER_BITS - 1)
        return (number + half) % (2 * half) - half

    @property
    def _shifts(self) -> range:
        return range(0, self._limbs * self._value_bits, self._value_bits)


class RingSum:
    """Vectors added as they arrive, in the memory of one."""

    def __init__(self, codec: RingCodec) -> None:
        self._codec = codec
        self._sum: RingVector = np.zeros(codec.length, dtype=codec.dtype)
        self.count = 0

    def add(self, vector: RingVector) -> None:
        """Add one site's vector. Raises ProtocolError, changing nothing, for one of another round."""
        if vector.dtype != self._codec.dtype or vector.shape != self._sum.shape:
            raise ProtocolError(f"an update of this run is {self._sum.size} numbers, not {vector.dtype} {vector.shape}")
        self._sum += vector
        self.count += 1

    def result(self, start: TrainableState) -> Outcome:
        """Read the sum, once there is one. Raises ProtocolError: see `RingCodec.decode`."""
        return self._codec.decode(self._sum, self.count, start)
