"""What others wrote comes to a log, an event or a terminal as one line of letters, bounded, and seldom."""

import logging
import logging.config

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_training.foundation.careful_logging import Careful, carefully
from core_training.foundation.errors import ProtocolError
from core_training.foundation.foreign_text import MOST_LETTERS, harmless
from core_training.foundation.seldom import Seldom
from core_training.runs import events
from core_training.runs.events import read_event

HOSTILE = [
    "\x1b[2J\x1b[1;1Hroot# ",
    "a\nerror: the node failed",
    "\x9b31m",
    "\x07\x08\r",
    "\u202egnp.exe",
    "\u2028line",
    "\x00",
    "\ud800",
    "\x1b]0;title\x07",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_acts_on_a_terminal_is_left(text):
    assert harmless(text).isprintable()
    harmless(text).encode()


@given(st.text(max_size=3000))
def test_it_is_printable_bounded_and_done_once(text):
    once = harmless(text)
    assert once.isprintable()
    assert len(once) <= MOST_LETTERS
    assert harmless(once) == once


def test_the_letters_left_out_are_counted():
    assert harmless("x" * 5_000).endswith(" … (4000 letters left out)")


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize(
    "of",
    [
        lambda text: events.Refused(peer="beta", reason=text),
        lambda text: events.PeerRefused(peer="beta", reason=text),
        lambda text: events.Quarantined(site="north", round=1, reason=text),
        lambda text: events.Failed(reason=text),
    ],
)
def test_an_event_is_harmless_wherever_it_is_shown(of, text):
    event = of(text)
    assert event.reason.isprintable()
    assert len(event.reason) == len(text)


def test_an_event_that_somebody_else_has_written_is_harmless_when_it_is_read():
    event = read_event({"event": "refused", "peer": "beta", "reason": HOSTILE[0]})
    assert isinstance(event, events.Refused)
    assert event.reason.isprintable()


def test_a_refusal_that_quotes_the_other_party_is_harmless_and_bounded():
    error = ProtocolError(f"unknown tensor '{HOSTILE[0] * 1000}'")
    assert str(error).isprintable()
    assert len(str(error)) <= MOST_LETTERS
    assert error.public == str(error)


def test_what_is_told_again_and_again_is_told_seldom_and_counted():
    seldom = Seldom(burst=3, seconds=10)
    told = {second: untold for second in range(61) if (untold := seldom.untold("beta", second)) is not None}
    assert list(told.items())[:4] == [(0, 0), (1, 0), (2, 0), (10, 7)]
    assert len(told) <= 3 + 60 / 10
    assert sum(told.values()) + len(told) > 61 - 10  # what is not told yet will be with the next
    assert seldom.untold("gamma", 61) == 0


@pytest.fixture
def careful(tmp_path):
    """A logger with a careful handler, and what it has written."""
    file = tmp_path / "careful.log"
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "handlers": {"file": {"class": "logging.FileHandler", "filename": str(file)}},
        "loggers": {"careful": {"handlers": ["file"], "level": "INFO", "propagate": False}},
    }
    logging.config.dictConfig(carefully(config))
    yield logging.getLogger("careful"), file.read_text
    for handler in logging.getLogger("careful").handlers:
        handler.close()


def test_a_log_has_no_line_that_somebody_else_wrote(careful):
    log, written = careful
    log.warning("refused: %s", "\x1b[2J\n2026-01-01 all is well")
    try:
        raise ValueError("\x1b[2J\n2026-01-01 all is well")
    except ValueError:
        log.exception("it failed")
    lines = written().splitlines()
    assert all(line.isprintable() for line in lines)
    assert [line for line in lines if not line.startswith("    ")] == [
        "refused:  [2J",
        "it failed",
        "Traceback (most recent call last):",
    ]


def test_a_record_whose_arguments_do_not_fit_is_written_as_it_stands(careful):
    log, written = careful
    log.info("100 % of %d", "it")
    assert written() == "100 % of %d\n"


def test_a_flood_of_warnings_is_not_written_and_notes_are(careful):
    log, written = careful
    for _ in range(10_000):
        log.warning("invalid request")
    for number in range(100):
        log.info("round %d", number)
    lines = written().splitlines()
    assert lines.count("invalid request") == 30
    assert len(lines) == 130


def test_a_flood_is_counted_when_it_is_told_again(monkeypatch):
    careful, now = Careful(), [0.0]
    monkeypatch.setattr("core_training.foundation.careful_logging.time.monotonic", lambda: now[0])

    def record():
        return logging.LogRecord("x", logging.WARNING, "x.py", 1, "invalid request", (), None)

    assert sum(careful.filter(record()) for _ in range(1000)) == 30
    now[0] = 60.0
    last = record()
    assert careful.filter(last)
    assert last.getMessage() == "invalid request (and 970 times more since the last such line)"


@pytest.mark.parametrize(("message", "arguments"), [("%(name)s", {"other": 1}), ("%d", ("x",)), ("%s %s", ("x",))])
def test_a_message_that_does_not_fit_its_arguments_ends_nobody(message, arguments):
    record = logging.makeLogRecord({"levelno": logging.INFO, "msg": message, "args": arguments})
    assert Careful().filter(record)
    assert record.getMessage() == message
