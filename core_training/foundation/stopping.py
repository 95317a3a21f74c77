"""The signals that ask a process to stop, and how it hears them.

Ctrl-C, a service manager, a dropped connection and a batch system ahead of the end of its time all mean the same. What
a command does about it is its own: stop at once, or when it is ready. Whoever does neither installs nothing here.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from signal import Signals
from typing import Any, NoReturn

from core_training.foundation.errors import Interrupted

STOPS = (Signals.SIGINT, Signals.SIGTERM, Signals.SIGHUP, Signals.SIGUSR1, Signals.SIGUSR2)

ECHO_SECONDS = 0.5
"""Seconds within which another signal is an echo of the first.

A dropped connection is told by the kernel and by the shell, launchers repeat what the terminal sent. Only a second
Ctrl-C is a person's at any time.
"""

_last_heard: tuple[Signals | None, float] = (None, -ECHO_SECONDS)
"""The last signal that counted, and when it came on the monotonic clock."""

_hearing = 0
"""The blocks that hear signals, one within the other."""


class StopNow(KeyboardInterrupt):
    """A signal ends what this process is doing, wherever it is; what was committed before is on disk."""

    def __init__(self, number: Signals) -> None:
        super().__init__(number.name)
        self.number = number


class StopRequest:
    """A request to stop; false until a signal has come, whose number it keeps."""

    number: Signals | None = None

    def __bool__(self) -> bool:
        return self.number is not None


def raise_stop(number: Signals) -> NoReturn:
    """Raise StopNow."""
    raise StopNow(number)


def exit_when_stopped() -> None:
    """Let any of the signals end this process, by SystemExit, so that what it leaves behind it is tidied up."""
    for number in STOPS:
        signal.signal(number, lambda *_: sys.exit(0))


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Let a signal raise StopNow in the main thread while the block runs."""
    with _heard_by(raise_stop):
        yield


@contextmanager
def stopping_when_ready(
    ask: Callable[[Signals], object], at_once: Callable[[Signals], object] = raise_stop
) -> Iterator[StopRequest]:
    """Let the first signal call `ask` while the block runs, and be noted in the request; a second calls `at_once`."""
    request = StopRequest()

    def hear(number: Signals) -> None:
        if request:
            at_once(number)
        else:
            request.number = number
            ask(number)

    with _heard_by(hear):
        yield request


@contextmanager
def saying(how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Raise Interrupted, with these words, where a signal ends the block at once."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(how_to_go_on(), number_of(stop)) from None


def hears_signals() -> bool:
    """Whether this process is a command, which hears signals by one of the blocks above."""
    return _hearing > 0


def number_of(stop: KeyboardInterrupt) -> Signals:
    """The signal that raised it."""
    return stop.number if isinstance(stop, StopNow) else Signals.SIGINT


@contextmanager
def _heard_by(hear: Callable[[Signals], object]) -> Iterator[None]:
    """Hand the signals in `STOPS` to `hear` while the block runs, but for echoes and a hang-up that nohup ignores.

    Outside the main thread, where Python hears no signals, nothing is installed.
    """

    def handler(number: int, frame: Any) -> None:
        if number == Signals.SIGHUP:
            _let_go_of_a_lost_terminal()
        if not _is_echo(Signals(number)):
            hear(Signals(number))

    global _hearing
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heeded = [one for one in STOPS if one != Signals.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}
    _hearing += 1
    try:
        yield
    finally:
        _hearing -= 1
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


def _is_echo(number: Signals) -> bool:
    global _last_heard
    now, (earlier, at) = time.monotonic(), _last_heard
    if now - at < ECHO_SECONDS and not number == earlier == Signals.SIGINT:
        return True
    _last_heard = number, now
    return False


def _let_go_of_a_lost_terminal() -> None:
    """Point the streams of a terminal that has hung up nowhere: each word to it would be an error."""
    for stream in (0, 1, 2):
        try:
            termios.tcgetattr(stream)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_RDWR)
                os.dup2(nowhere, stream)
                os.close(nowhere)
