"""Orders out to sites over a grid, checked replies back; what is wrong with one is an event, not an end.

A reply is matched to its site by the id of the order it answers: Flower may report a failure under the wrong node.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

from core_training.foundation.errors import BeyondAnnouncedError, NarrowScaleError, ProtocolError
from core_training.runs import events
from core_training.runs.run_folder import RunFolder
from flower_transport.grid import Grid
from flower_transport.reply import Reply
from server.progress import Progress
from strategies.messages import Message

_LOOKS_AGAIN_AFTER = 5.0
"""Seconds after which a look for answers ends in which there were none: some learn by it that a site is gone."""

_KEPT_AFTER_DEADLINE = 30.0
"""Seconds after the deadline for which an answer that came in time is still to be had."""

Answer = TypeVar("Answer", bound=Message)


@dataclass(frozen=True)
class Asked:
    """An order that is out: to which site, of which kind and round, and until when it is waited for (monotonic)."""

    site: str
    kind: str
    round: int
    until: float


@dataclass
class Awaited:
    """Orders that are out, by the ids of their messages, and the answers that were there and not looked at yet."""

    orders: dict[str, Asked] = field(default_factory=dict)
    arriving: Iterator[Reply] = field(default_factory=lambda: iter(()))


class OrderExchange:
    """The orders and answers of one run; `progress` counts the bytes, also of answers that are set aside."""

    def __init__(self, grid: Grid, folder: RunFolder, deadline_seconds: float, progress: Progress) -> None:
        self._grid = grid
        self._folder = folder
        self._deadline_seconds = deadline_seconds
        self._progress = progress
        self.too_narrow = False
        """Whether an update did not fit its scale, since this was last set to False."""
        self.hopeless: set[str] = set()
        """The sites whose newest fault was a fatal one: to ask them the same again would not help."""
        self.outgrown: set[str] = set()
        """The sites whose figures went beyond what they had announced: they are to announce themselves anew."""
        self.reasons: dict[str, str] = {}
        """The newest reason for which each site was set aside."""

    def ask(
        self,
        order: Message | Mapping[str, Message],
        to: Mapping[int, str],
        reply: type[Answer],
        round_number: int,
        patience: float = math.inf,
        payload: bytes | memoryview = b"",
        awaited: Awaited | None = None,
        enough: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[str, Answer]]:
        """Send `order` to nodes (id: site) and yield (site, reply) as replies arrive, until all have or the deadline.

        `order` is the same for all, or one for each site; `patience` is an earlier end of the waiting, in seconds. A
        `payload` goes with each of them, and is not kept once it was sent. With those that are `awaited` already,
        theirs are waited for, too; what is out still, when there are `enough`, stays in it.
        A reply that is malformed, of another kind or an error is quarantined; one that was not there at the deadline is
        an event `late`. However long it takes to take in the others', no reply that was there is late.
        """
        awaited = awaited or Awaited()
        self.send(order, to, round_number, awaited, patience, payload)
        del payload
        out, is_over = awaited.orders, set[str]()
        while not enough():
            for answer in awaited.arriving:
                if (asked := out.pop(answer.order, None)) is not None:
                    with self.quarantine(asked.site, round_number):
                        opened = reply.open(answer.envelope())
                        self._progress.bytes_up += len(opened.payload)
                        self.reasons.pop(asked.site, None)
                        yield asked.site, opened
                        del opened  # its payload, before the next ones are fetched
                del answer  # before the next ones are fetched
                if enough():
                    return
            for late in [out.pop(message) for message in list(out) if message in is_over]:
                self._folder.event(events.Late(site=late.site, round=late.round, order=late.kind))
            if not out:
                break
            now = time.monotonic()
            is_over = {message for message, asked in out.items() if asked.until <= now}
            left = min(asked.until for asked in out.values()) - now
            awaited.arriving = self._grid.replies(list(out), min(_LOOKS_AGAIN_AFTER, max(left, 0.0)))

    def send(
        self,
        order: Message | Mapping[str, Message],
        to: Mapping[int, str],
        round_number: int,
        awaited: Awaited,
        patience: float = math.inf,
        payload: bytes | memoryview = b"",
    ) -> None:
        """Send as `ask` does, and add to what is awaited."""
        if not to:
            return
        self.hopeless.difference_update(to.values())
        shared = order.envelope() if isinstance(order, Message) else None
        envelopes = {node: shared or order[site].envelope() for node, site in to.items()}  # type: ignore[index]
        if payload:
            envelopes = {node: replace(envelope, payload=payload) for node, envelope in envelopes.items()}
        until = time.monotonic() + min(self._deadline_seconds, patience)
        self._progress.bytes_down += sum(len(envelope.payload) for envelope in envelopes.values())
        ttl = self._deadline_seconds + _KEPT_AFTER_DEADLINE
        for message, node in self._grid.send(envelopes, ttl).items():
            awaited.orders[message] = Asked(to[node], envelopes[node].kind, round_number, until)

    def recent_reasons(self) -> str:
        """The latest reasons for setting sites aside."""
        return "; ".join([f"{event.site}: {event.reason}" for event in self._folder.events(events.Quarantined)][-3:])

    @contextmanager
    def quarantine(self, site: str, round_number: int) -> Iterator[None]:
        """A ProtocolError inside the block becomes an event with the site's true name and the reason."""
        try:
            yield
        except ProtocolError as error:
            self.too_narrow |= isinstance(error, NarrowScaleError)
            if isinstance(error, BeyondAnnouncedError):
                self.outgrown.add(site)
            if error.fatal:
                self.hopeless.add(site)
            quarantined = events.Quarantined(site=site, round=round_number, reason=str(error))
            self.reasons[site] = quarantined.reason
            self._folder.event(quarantined)
