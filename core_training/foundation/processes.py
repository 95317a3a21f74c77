"""A function over many values in several processes, in their order."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any, TypeVar

V = TypeVar("V")
R = TypeVar("R")

_ALONE = 512
"""So many values are sooner done than processes are started."""
_AT_ONCE = 64
_AHEAD = 8
"""Values that a process gets at once, and how many such lots each has before it."""

_function: Callable[[Any], Any] | None = None
"""The function of a forked process."""


def in_processes(function: Callable[[V], R], values: Iterable[V], processes: int) -> Iterator[R]:
    """The function's results in the values' order, computed in forked processes; in this one where none can be forked.

    The function itself is inherited, so it may be anything; values and results travel. Fork in a process that runs
    nothing else: other threads' locks stay as they are for ever.
    """
    global _function
    values = iter(values)
    yield from map(function, islice(values, _ALONE))
    if processes < 2 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(function, values)
        return
    if not (first := list(islice(values, 1))):
        return
    _function = function
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that libraries have idle threads
        pool = multiprocessing.get_context("fork").Pool(processes)
    with pool:
        lots = chain(first, values)
        waiting = [pool.apply_async(_all, (lot,)) for lot in _lots(lots, processes * _AHEAD)]
        while waiting:
            yield from waiting.pop(0).get()
            waiting += [pool.apply_async(_all, (lot,)) for lot in _lots(lots, 1)]


def _lots(values: Iterator[V], most: int) -> Iterator[list[V]]:
    for _ in range(most):
        if not (lot := list(islice(values, _AT_ONCE))):
            return
        yield lot


def _all(lot: list[Any]) -> list[Any]:
    assert _function is not None
    return [_function(value) for value in lot]
