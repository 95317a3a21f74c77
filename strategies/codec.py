"""The interface of codecs that write each state by itself, and the plainest: the state as it is, in float32."""

from __future__ import annotations

from core_training.foundation.state import Manifest, TrainableState
from strategies.selection import Selection


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
    """The state as it is, as safetensors."""

    def write(self, trained: TrainableState, start: TrainableState | None, key: bytes) -> bytes:
        return trained.to_bytes()

    def read(self, payload: bytes | memoryview, start: TrainableState | None) -> TrainableState:
        return TrainableState.on_bytes(payload, self.manifest)
