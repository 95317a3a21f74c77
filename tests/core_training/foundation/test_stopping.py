"""What a process hears of the signals that ask it to stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from signal import Signals

import pytest

from core_training.foundation import stopping
from core_training.foundation.errors import Interrupted
from core_training.foundation.stopping import STOPS, StopNow, saying, stopping_at_once, stopping_when_ready

PID = os.getpid()


@pytest.fixture(autouse=True)
def _nothing_heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(stopping, "_last_heard", (None, -stopping.ECHO_SECONDS))
    before = {number: signal.getsignal(number) for number in STOPS}
    yield
    assert {number: signal.getsignal(number) for number in STOPS} == before


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_ends_a_block_with_its_own_code_and_the_blocks_words(number: Signals) -> None:
    with (
        pytest.raises(Interrupted, match="go on like this") as stopped,
        saying(lambda: "go on like this"),
        stopping_at_once(),
    ):
        os.kill(PID, number)
    assert stopped.value.exit_code == 128 + number


@pytest.mark.parametrize("number", STOPS)
def test_the_first_signal_asks_and_the_second_ends_at_once(number: Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "ECHO_SECONDS", 0.0)
    asked: list[Signals] = []
    with stopping_when_ready(asked.append) as request:
        assert not request
        os.kill(PID, number)
        assert (asked, request.number) == ([number], number)
        with pytest.raises(StopNow):
            os.kill(PID, number)
    assert asked == [number]


def test_what_the_shell_and_launchers_repeat_is_one_signal_and_a_second_ctrl_c_is_two() -> None:
    with stopping_when_ready(lambda _: None) as request:
        os.kill(PID, signal.SIGHUP)  # the kernel's
        os.kill(PID, signal.SIGHUP)  # the shell's
        os.kill(PID, signal.SIGTERM)  # a service manager's
        assert request.number == signal.SIGHUP
    stopping._last_heard = (None, -stopping.ECHO_SECONDS)
    with stopping_when_ready(lambda _: None), pytest.raises(StopNow):  # noqa: PT012
        os.kill(PID, signal.SIGINT)
        os.kill(PID, signal.SIGINT)


def test_under_nohup_a_dropped_connection_is_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping_at_once():
            os.kill(PID, signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_besides_the_main_one_installs_nothing() -> None:
    heard: list[object] = []

    def work() -> None:
        with stopping_at_once():
            heard.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert heard == [signal.getsignal(signal.SIGTERM)]
