"""The interface of codecs that write each state by itself, and the plainest: the state as it is, in float32."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import Manifest, TrainableState
from strategies.draws import PIECE
from strategies.selection import Selection

_NOTHING = np.empty(0, dtype=np.float32)


class StateCodec:
    """A writer and reader of one manifest's states; `selection` is the part of a change that travels, None for all."""

    def __init__(self, manifest: Manifest, selection: Selection | None) -> None:
        self.manifest = manifest
        self.selection = selection

    def write(self, trained: TrainableState, start: TrainableState | None, key: bytes) -> bytes:
        """The bytes that travel. `start` is the state that both ends hold; `key` decides how values are rounded.

        Raises ProtocolError for what must not enter a mean.
        """
        raise NotImplementedError

    def read(self, payload: bytes | memoryview, start: TrainableState | None) -> TrainableState:
        """The state that was meant, which may be a view of the bytes. Raises ProtocolError for others than its own."""
        raise NotImplementedError


class Fp32(StateCodec):
    """The state as it is, as safetensors; where a part of it travels, those values one after the other."""

    def write(self, trained: TrainableState, start: TrainableState | None, key: bytes) -> bytes:
        if self.selection is None:
            return trained.to_bytes()
        pieces = [trained.buffer[piece][self.selection.piece(piece.start, piece.stop)] for piece in self._pieces()]
        return np.concatenate([*pieces, _NOTHING]).astype("<f4", copy=False).tobytes()

    def read(self, payload: bytes | memoryview, start: TrainableState | None) -> TrainableState:
        if self.selection is None:
            return TrainableState.on_bytes(payload, self.manifest)
        if len(payload) != (expected := 4 * self.selection.count):
            raise ProtocolError(f"an update of this run takes {expected} bytes, not {len(payload)}")
        assert start is not None, "what does not travel is as it was"
        values, place = np.frombuffer(payload, dtype="<f4"), 0
        state = TrainableState(self.manifest, start.buffer.copy())
        for piece in self._pieces():
            chosen = self.selection.piece(piece.start, piece.stop)
            count = int(np.count_nonzero(chosen))
            state.buffer[piece][chosen] = values[place : place + count]
            place += count
        return state

    def _pieces(self) -> Iterator[slice]:
        size = self.manifest.size
        return (slice(start, min(start + PIECE, size)) for start in range(0, size, PIECE))
