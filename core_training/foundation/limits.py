"""Limits for what runs on somebody else's input inside this process: how long, and how much more memory.

For code that ends by itself on honest input, and that nothing else bounds: a chat template that loops, a column that
unfolds to more than the machine holds. Where the limit is reached an ordinary error is raised, and the process goes on.
"""

from __future__ import annotations

import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_AGAIN_AFTER = 0.5
_PAGE = resource.getpagesize()
_STATM = Path("/proc/self/statm")


class TooMuchError(RuntimeError):
    """It would have taken more time or memory than anything honest does."""


@contextmanager
def within(seconds: float, memory: int) -> Iterator[None]:
    """Raise TooMuchError in the block once it has run for so long, or where it asks for so many more bytes.

    Only the main thread can be interrupted (`can_interrupt`): in others the memory alone is bounded.
    """
    with _for_so_long(seconds), _with_so_much(memory):
        try:
            yield
        except MemoryError:
            raise TooMuchError(f"it takes more than {memory >> 20} MiB of memory") from None


def can_interrupt() -> bool:
    """Whether this thread is the one that a time limit can end."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _for_so_long(seconds: float) -> Iterator[None]:
    if not can_interrupt():
        yield
        return

    is_over = False

    def interrupt(_number: int, _frame: Any) -> None:
        if not is_over:
            raise TooMuchError(f"it takes more than {seconds:g} s")

    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, interrupt)
    # Again and again: what runs may catch the error (Jinja does so where it computes constants) and go on.
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_AFTER)
    try:
        yield
    finally:
        is_over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # whoever set an alarm before is told of it a little later at the most
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3), interval)


@contextmanager
def _with_so_much(memory: int) -> Iterator[None]:
    if not _STATM.exists():  # not Linux
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = _address_space() + memory
    given = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([most, *given]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int:
    """Bytes of addresses that this process has taken, whether it uses them or not."""
    return int(_STATM.read_bytes().split()[0]) * _PAGE
