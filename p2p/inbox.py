"""The updates that have come in: checked before they take memory, checked again when they are whole, kept by round.

Pure bookkeeping for one node; knows no network. Whatever is wrong with an update is a ProtocolError in words.
"""

from __future__ import annotations

import math

from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import Manifest
from core_training.recipe.schema import Recipe
from p2p.messages import Hello, UpdateHeader
from p2p.neighbour_codec import NeighbourCodec
from strategies.bounds import check_weight
from strategies.mixing import Contribution
from strategies.weights import known_weight, most_weight_in_mean


class Inbox:
    """Updates of the round after the last committed one, and of the one after that (from nodes that are ahead)."""

    def __init__(self, run_id: str, manifest: Manifest, recipe: Recipe, codec: NeighbourCodec) -> None:
        self._run_id = run_id
        self._manifest = manifest
        self._codec = codec
        self._recipe = recipe
        self._steps = recipe.topology.most_local_steps or 1
        self._most_weight = most_weight_in_mean(recipe, self._steps)
        self._updates: dict[int, dict[str, Contribution]] = {}
        self._refused: set[tuple[int, str]] = set()
        self._told: set[tuple[int, str]] = set()

    def check_header(self, sender: str, header: UpdateHeader, hello: Hello) -> None:
        """Refuse, before a byte of it is read, an update that cannot be right.

        `hello` is the sender's newest greeting: its update weighs no more than what it announced there can.
        """
        if header.sender != sender:
            raise ProtocolError(f"it says it comes from '{header.sender}'")
        if header.run_id != self._run_id:
            raise ProtocolError(f"it belongs to run '{header.run_id}'; this is run '{self._run_id}'")
        if header.manifest_digest != self._manifest.digest:
            raise ProtocolError("its manifest is another one: other trainable tensors")
        if header.size > self._manifest.max_message_bytes:
            raise ProtocolError(f"{header.size} bytes; a state takes at most {self._manifest.max_message_bytes}")
        if not (math.isfinite(header.weight) and 0 < header.weight <= self._most_weight):
            raise ProtocolError(f"weight {header.weight}; that of a round lies in 1 … {self._most_weight}")
        known = known_weight(self._recipe, sender)
        if known not in (None, header.weight):
            raise ProtocolError(f"weight {header.weight}; the recipe gives it {known}")
        if known is None:
            check_weight(self._recipe, self._steps, header.weight, hello.train_examples, hello.processes)

    def put(self, header: UpdateHeader, payload: bytes) -> None:
        """Keep a whole update. A second one of the same sender and round changes nothing."""
        state = self._codec.read(payload)
        if not state.is_finite():
            raise ProtocolError("its tensors hold NaN or infinite values")
        contribution = Contribution(header.sender, state, header.weight, header.degree, header.wants_to_stop)
        self._updates.setdefault(header.round, {}).setdefault(header.sender, contribution)

    def refuse(self, number: int, sender: str) -> None:
        """Expect nothing more of this sender in this round."""
        self._refused.add((number, sender))

    def drop(self, number: int, sender: str) -> None:
        """Forget an update that turned out to be unsound, and expect no other in its place."""
        self._updates.get(number, {}).pop(sender, None)
        self._told.discard((number, sender))
        self.refuse(number, sender)

    def has(self, number: int, sender: str) -> bool:
        return sender in self._updates.get(number, {})

    def settled(self, number: int, sender: str) -> bool:
        """Whether the sender's update is here, or was refused."""
        return self.has(number, sender) or (number, sender) in self._refused

    def take(self, number: int) -> list[Contribution]:
        """The updates of a round."""
        return list(self._updates.get(number, {}).values())

    def take_new(self, number: int) -> list[Contribution]:
        """The updates of a round that this has not returned before."""
        new = [update for update in self.take(number) if (number, update.name) not in self._told]
        self._told.update((number, update.name) for update in new)
        return new

    def forget_through(self, number: int) -> None:
        """Drop all that belongs to this and earlier rounds."""
        self._updates = {one: updates for one, updates in self._updates.items() if one > number}
        self._refused = {(one, sender) for one, sender in self._refused if one > number}
        self._told = {(one, sender) for one, sender in self._told if one > number}
