"""The bf16 codec: the change of a state from one that both ends hold, each value rounded to bfloat16 at random.

Half the bytes of a whole state. Unbiased, so that the mean over sites and rounds loses nothing but a little noise.
"""

from __future__ import annotations

import numpy as np

from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import TrainableState
from strategies.codec import StateCodec
from strategies.draws import PIECE, draws
from strategies.selection import Selection

_LARGEST = float.fromhex("0x1.fep127")
"""The largest of bfloat16's finite values."""


class Bf16(StateCodec):
    """Changes in bfloat16."""

    def write(self, trained: TrainableState, start: TrainableState | None, key: bytes) -> bytes:
        assert start is not None, "a change is one from a state"
        return encode(trained, start, key, self.selection)

    def read(self, payload: bytes | memoryview, start: TrainableState | None) -> TrainableState:
        assert start is not None, "a change is one from a state"
        return decode(payload, start, self.selection)


def encode(trained: TrainableState, reference: TrainableState, key: bytes, selection: Selection | None = None) -> bytes:
    """The values that travel, little endian. `key` (see `draws.rounding_key`) decides how they are rounded.

    Raises ProtocolError for NaN and infinite changes.
    """
    size = trained.manifest.size
    rounded = np.empty(size if selection is None else selection.count, dtype="<u2")
    place = 0
    for start in range(0, size, PIECE):
        stop = min(start + PIECE, size)
        change = trained.buffer[start:stop] - reference.buffer[start:stop]
        # NaN compares false, so it is refused too. A carry above the largest value would make it infinite.
        if not max(float(change.max()), -float(change.min())) <= _LARGEST:
            raise ProtocolError("the change holds NaN, infinite or too large values")
        # Only after the check: a state with NaN in it is broken, whether the value travels in this round or not.
        if selection is not None:
            change = change[selection.piece(start, stop)]
        # bfloat16 is the upper half of float32. A carry from the lower half goes to the next larger one, as it should.
        bits = change.view(np.uint32) + draws(key, start, change.size)
        rounded[place : place + change.size] = bits >> 16
        place += change.size
    return rounded.tobytes()


def decode(data: bytes | memoryview, reference: TrainableState, selection: Selection | None = None) -> TrainableState:
    """The state that was meant; values that did not travel are the reference's.

    Raises ProtocolError for a wrong length, and for what would not be a finite state.
    """
    size = reference.manifest.size
    expected = 2 * (size if selection is None else selection.count)
    if len(data) != expected:
        raise ProtocolError(f"an update of this run takes {expected} bytes, not {len(data)}")
    rounded = np.frombuffer(data, dtype="<u2")
    state = TrainableState(reference.manifest, reference.buffer.copy())
    place = 0
    for start in range(0, size, PIECE):
        values = state.buffer[start : min(start + PIECE, size)]
        chosen = slice(None) if selection is None else selection.piece(start, start + values.size)
        before = values[chosen]
        change = rounded[place : place + before.size].astype(np.uint32) << 16
        values[chosen] = before + change.view(np.float32)
        place += before.size
    # The sender is not trusted: its bits may be NaN, and a large change may overflow where it is added.
    if not state.is_finite():
        raise ProtocolError("the state holds NaN or infinite values")
    return state
