"""A look at the federation's server from a site: whether it can be reached, and if not why; whether the clocks agree.

A site proves who it is by signing the time. To a server whose clock differs it is nobody, and Flower says no more.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, cast

from client.server_address import parse_server
from security.certificates import ENDS_SOON_DAYS

AHEAD_SECONDS = 5
BEHIND_SECONDS = 300
"""How far a site's clock may be ahead of the server's, and behind it, for Flower to take its messages."""

_PATIENCE = 5.0
_WRITTEN_EVERY = 1.0
"""Seconds between two times that a server writes down to tell, each in whole seconds: what is told is that much old."""

_ABOUT_TIME = (9, 10)
"""OpenSSL's codes of a certificate that is not valid yet, and of one that has expired."""


@dataclass(frozen=True)
class ServerProbe:
    """What a look at the server showed.

    `failure` says why it cannot be reached, `distrusted` that it was, and that this site must not talk to it.
    `clock_ahead` is by how many seconds this machine's clock is ahead of the server's, `clock_within` how much more or
    less it may be.
    """

    failure: str | None = None
    distrusted: bool = False
    clock_ahead: float | None = None
    clock_within: float = 0.0
    certificate_ends: date | None = None

    @property
    def attention(self) -> Iterator[str]:
        """What a person should see to, each with what to do."""
        if self.failure is not None:
            yield f"the server {'' if self.distrusted else 'cannot be reached: '}{self.failure}"
        if (note := self.clock_note) is not None:
            yield note
        if self.certificate_ends is not None:
            days = (self.certificate_ends - datetime.now(UTC).date()).days
            if days <= ENDS_SOON_DAYS:
                yield f"the server's certificate ends on {self.certificate_ends}; its operator must issue a new one"

    @property
    def clock_note(self) -> str | None:
        """What to do about a clock that keeps the server from taking this site in; None where it does not."""
        ahead, within = self.clock_ahead, self.clock_within
        if ahead is None or -BEHIND_SECONDS - within <= ahead <= AHEAD_SECONDS + within:
            return None
        how = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'}"
        return (
            f"this machine's clock is {how} the server's, which takes no site whose clock is more than "
            f"{AHEAD_SECONDS} s ahead or {BEHIND_SECONDS} s behind; set both by the network's time (timedatectl)"
        )


def probe_server(address: str, authority: Path) -> ServerProbe:
    """Look at the server at HOST:PORT, whose certificate `authority` must have signed; a few seconds at most."""
    host, port = parse_server(address)
    connection = HTTPSConnection(
        host, port, timeout=_PATIENCE, context=ssl.create_default_context(cafile=str(authority))
    )
    try:
        connection.connect()
        shown = cast(dict[str, Any], connection.sock.getpeercert())
        ends = datetime.fromtimestamp(ssl.cert_time_to_seconds(shown["notAfter"]), UTC).date()
        asked = time.time()
        connection.request("GET", "/health")
        told, took = connection.getresponse().getheader("Date"), time.time() - asked
        if told is None:
            return ServerProbe(certificate_ends=ends)
        ahead = asked + took / 2 - parsedate_to_datetime(told).timestamp() - _WRITTEN_EVERY
        return ServerProbe(clock_ahead=ahead, clock_within=took / 2 + _WRITTEN_EVERY, certificate_ends=ends)
    except ssl.SSLCertVerificationError as error:
        clock = "; is this machine's clock right?" if error.verify_code in _ABOUT_TIME else ""
        what = f"shows a certificate that {authority} does not vouch for: {error.verify_message}{clock}"
        return ServerProbe(what, distrusted=True)
    except TimeoutError:
        return ServerProbe(f"no answer within {_PATIENCE:g} s; is something between that lets nothing through?")
    except (OSError, HTTPException, ValueError) as error:
        return ServerProbe(str(getattr(error, "strerror", None) or error))
    finally:
        connection.close()
