"""Sites of a simulation that send poisoned updates. For benchmarks and tests alone: the sites are this process's own.

What a site sends is changed where its update is written, before a codec or a mask: as whoever owns a site could.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

import client.site
from client.update_writer import TrainedSlice, UpdateWriter
from core_training.foundation.state import TrainableState
from strategies.messages import MaskedUpdate, TrainOrder, Update

Change = npt.NDArray[np.float64]
Attack = Callable[[Change, TrainOrder], Change]
"""Makes what is sent of a site's own change of the state."""

_NOISE = 10.0
"""Times the length of the site's own change."""


def times(factor: float) -> Attack:
    """The site's own change, so many times."""
    return lambda change, order: factor * change


def noise(change: Change, order: TrainOrder) -> Change:
    """Gaussian noise of ten times the length."""
    drawn = np.random.default_rng(order.round).normal(size=change.size)
    return _NOISE * float(np.linalg.norm(change)) / max(float(np.linalg.norm(drawn)), 1e-30) * drawn


ATTACKS: Mapping[str, Attack] = {"sign flip": times(-1.0), "times -10": times(-10.0), "noise": noise}


class _PoisonedWriter(UpdateWriter):
    attack: Attack

    def write(self, order: TrainOrder, trained: TrainedSlice, *given: Any, **named: Any) -> Update | MaskedUpdate:
        before = trained.start.buffer.astype(np.float64)
        change = self.attack(trained.trained.buffer - before, order)
        if order.ring is not None:  # what a scale would cut in many places is not written: the most that it takes
            codec, place = self._codec(order, trained), 0
            for tensor, limit in zip(trained.start.manifest.tensors, codec._limits, strict=True):
                np.clip(change[place : place + tensor.size], -limit, limit, out=change[place : place + tensor.size])
                place += tensor.size
        state = TrainableState(trained.start.manifest, (before + change).astype(np.float32))
        return super().write(order, replace(trained, trained=state), *given, **named)


@contextmanager
def poisoned(sites: Collection[str], attack: Attack) -> Iterator[None]:
    """Have these sites of a simulation in this process send what `attack` makes of their updates."""

    def made(*given: Any) -> UpdateWriter:
        if given[-1] not in sites:
            return UpdateWriter(*given)
        writer = _PoisonedWriter(*given)
        writer.attack = attack
        return writer

    with patch.object(client.site, "UpdateWriter", made):
        yield
