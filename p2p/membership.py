"""The roster's peers: those that answer, those silent, those that train something else. Pure; the caller has the clock.

A peer is down when several calls in a row have failed and it has not been heard for some seconds: a connection that is
just being made can fail any number of times in a moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core_training.runs import events
from core_training.runs.run_folder import Listener
from p2p.messages import Hello

DOWN_AFTER_CALLS = 3
DOWN_AFTER_SECONDS = 3.0


@dataclass
class Peer:
    """A peer as it is known. `misses` counts failed calls since it was `heard_at`, in the caller's seconds."""

    hello: Hello | None = None
    heard_at: float = 0.0
    misses: int = 0
    down: bool = True
    differs: str | None = None

    @property
    def live(self) -> bool:
        """Whether it answers, and trains what this node trains."""
        return self.hello is not None and self.differs is None and not self.down


class Membership:
    """The peers of one node. `event` is told when one comes, goes or turns out to differ."""

    def __init__(self, name: str, roster: Sequence[str], event: Listener) -> None:
        self._peers = {member: Peer() for member in roster if member != name}
        self._event = event

    @property
    def others(self) -> tuple[str, ...]:
        """Every peer of the roster."""
        return tuple(self._peers)

    @property
    def live(self) -> tuple[str, ...]:
        """The peers that are there, in roster order."""
        return tuple(name for name, peer in self._peers.items() if peer.live)

    def is_live(self, name: str) -> bool:
        return self._peers[name].live

    def hello_of(self, name: str) -> Hello | None:
        """The last thing a peer said about itself."""
        return self._peers[name].hello

    def difference_of(self, name: str) -> str | None:
        """The reason a peer cannot take part; None when it can, or has not been heard."""
        return self._peers[name].differs

    def hellos(self) -> list[Hello]:
        """The live peers' last hellos."""
        return [peer.hello for peer in self._peers.values() if peer.live and peer.hello is not None]

    def differences(self) -> list[str]:
        """Reasons why answering peers cannot take part."""
        return [peer.differs for peer in self._peers.values() if peer.differs is not None]

    def heard(self, hello: Hello, own: Hello, now: float) -> None:
        """Note a peer's hello. One that differs is not averaged with until it agrees."""
        peer = self._peers[hello.sender]
        differs = own.difference_from(hello)
        if differs is not None and differs != peer.differs:
            self._event(events.PeerRefused(peer=hello.sender, reason=differs))
        was_live, before = peer.live, peer.hello
        peer.hello, peer.heard_at, peer.misses, peer.down, peer.differs = hello, now, 0, False, differs
        if peer.live and (not was_live or before is None or _has(before) != _has(hello)):
            records, processes = _has(hello)
            self._event(
                events.PeerUp(peer=hello.sender, committed=hello.committed, train_examples=records, processes=processes)
            )

    def missed(self, name: str, reason: str, now: float) -> None:
        """Note a failed call."""
        peer = self._peers[name]
        was_live = peer.live
        peer.misses += 1
        peer.down = peer.misses >= DOWN_AFTER_CALLS and now - peer.heard_at >= DOWN_AFTER_SECONDS
        if was_live and not peer.live:
            self._event(events.PeerDown(peer=name, reason=reason))


def _has(hello: Hello) -> tuple[int, int]:
    """The records and processes that a peer announces."""
    return hello.train_examples, hello.processes
