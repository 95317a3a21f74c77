"""A function over many values in several processes, in their order."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from core_training.foundation.errors import RunError

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
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"))
        lots = _lots(chain(first, values))
        waiting = deque(pool.submit(_all, lot) for lot in islice(lots, processes * _AHEAD))
    try:
        while waiting:
            yield from waiting.popleft().result()
            waiting.extend(pool.submit(_all, lot) for lot in islice(lots, 1))
    except BrokenProcessPool:
        raise RunError(
            "a process that works on the records was ended from outside, as by a lack of memory; use fewer of them at "
            "once (taskset), or shorter records"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _lots(values: Iterator[V]) -> Iterator[list[V]]:
    while lot := list(islice(values, _AT_ONCE)):
        yield lot


def _all(lot: list[Any]) -> list[Any]:
    assert _function is not None
    return [_function(value) for value in lot]
