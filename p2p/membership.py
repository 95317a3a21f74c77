"""Who of the roster is there: who answers, who does not, and who trains something else. Pure; no clock, no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from p2p.messages import Hello

DOWN_AFTER = 3
"""Calls in a row that may fail before a peer counts as down."""


@dataclass
class Peer:
    """What is known of one peer. `misses` counts failed calls since it last answered."""

    hello: Hello | None = None
    misses: int = DOWN_AFTER
    differs: str | None = None

    @property
    def live(self) -> bool:
        """Whether it answers, and trains what this node trains."""
        return self.hello is not None and self.differs is None and self.misses < DOWN_AFTER


class Membership:
    """The peers of one node. `event` is told when one comes, goes or turns out to differ."""

    def __init__(self, name: str, roster: Sequence[str], event: Callable[..., Any]) -> None:
        self.name = name
        self.roster = tuple(roster)
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
        """Why a peer cannot take part; None when it can, or has not been heard."""
        return self._peers[name].differs

    def hellos(self) -> list[Hello]:
        """What the live peers last said about themselves."""
        return [peer.hello for peer in self._peers.values() if peer.live and peer.hello is not None]

    def differences(self) -> list[str]:
        """Why peers that answered cannot take part."""
        return [peer.differs for peer in self._peers.values() if peer.differs is not None]

    def heard(self, hello: Hello, own: Hello) -> None:
        """A peer said hello. Whoever differs is not averaged with, until it says otherwise."""
        peer = self._peers[hello.sender]
        differs = own.difference_from(hello)
        if differs is not None and differs != peer.differs:
            self._event("peer_refused", peer=hello.sender, reason=differs)
        was_live = peer.live
        peer.hello, peer.misses, peer.differs = hello, 0, differs
        if peer.live and not was_live:
            self._event("peer_up", peer=hello.sender, committed=hello.committed)

    def missed(self, name: str, reason: str) -> None:
        """A call to a peer failed."""
        peer = self._peers[name]
        was_live = peer.live
        peer.misses += 1
        if was_live and not peer.live:
            self._event("peer_down", peer=name, reason=reason)
