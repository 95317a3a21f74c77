"""What a node tells in its run folder: nothing that a peer causes fills the disk, and a full disk silences nobody.

A peer can have itself refused at any rate; what it causes is told a few times, then seldom, and counted.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from core_training.foundation.errors import RunError
from core_training.foundation.seldom import Seldom
from core_training.runs import events
from core_training.runs.run_folder import Listener

_log = logging.getLogger(__name__)

_AT_ONCE = 20
_THEN_ONE_IN_SECONDS = 10.0


class Telling:
    """The way of a node's events to whoever keeps them. Is itself a `Listener`, on the event loop."""

    def __init__(self, keep: Listener) -> None:
        self._keep = keep
        self._seldom = Seldom(_AT_ONCE, _THEN_ONE_IN_SECONDS)

    def __call__(self, event: events.Event) -> None:
        """Have the event kept, unless much like it was. A disk that refuses it is told of on standard error."""
        if isinstance(event, events.OfPeer):
            untold = self._seldom.untold((event.NAME, event.peer), asyncio.get_running_loop().time())
            if untold is None:
                return
            event = replace(event, untold=untold)
        try:
            self._keep(event)
        except (RunError, OSError) as error:
            _log.warning("%s; the node goes on. Not written: %s", error, event.document())
