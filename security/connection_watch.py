"""The watch over the connections to a port: who does not prove within seconds who it is, is let go.

A stranger needs no key to connect. Each connection that stays silent, or stops in the middle of a handshake, takes a
descriptor and memory, and the libraries that listen here bound neither by address. So this looks at the process's own
sockets a few times a second and shuts those down that have no business here; to the library that owns the socket this
is an ordinary end of its connection, and no byte takes another way. Knows neither HTTP nor gRPC: whoever speaks one of
them says which connections have proven whose they are.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import resource
import socket
import stat
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

_log = logging.getLogger(__name__)

_LOOKS_EVERY = 0.25
"""Seconds: short enough for a burst to find room again before anybody honest gives up."""

_TELLS_EVERY = 60.0
_DESCRIPTORS = "/dev/fd"
_MOST_LOOKED_AT = 1 << 16
_HOSTS_NAMED = 3

Address = tuple[str, int]
"""The other end of a connection: host and port."""


@dataclass(frozen=True)
class _Connection:
    """An accepted connection: its other end, and by which descriptor and inode this process has it."""

    address: Address
    descriptor: int
    inode: int


@dataclass(frozen=True)
class _Proof:
    """Whose a connection is, and when that was proven (monotonic seconds)."""

    name: str | None
    made_at: float


@dataclass(frozen=True)
class ConnectionLimits:
    """The connections that are kept. Over a limit the oldest are let go, so that who comes new has its chance.

    `proves_within` is in seconds. Many sites may lie behind one address, and prove themselves in turn.
    """

    proves_within: float = 10.0
    unproven_by_host: int = 32
    unproven: int = 128
    by_name: int = 64


class ConnectionWatch:
    """The watch over one port of this process, in a thread of its own, from `start` to `stop`."""

    def __init__(self, port: int, limits: ConnectionLimits | None = None) -> None:
        self._port = port
        self._limits = limits or ConnectionLimits()
        self._since: dict[Address, float] = {}
        self._proofs: dict[Address, _Proof] = {}
        self._ended: set[int] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._let_go: Counter[str] = Counter()
        self._told_at = -_TELLS_EVERY

    def start(self) -> None:
        """Begin to watch."""
        threading.Thread(target=self._watch, name="connection-watch", daemon=True).start()

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()

    def prove(self, address: Address, name: str | None = None) -> None:
        """Keep the connection with this other end: it has proven that it is `name`'s, or this machine's own."""
        with self._lock:
            self._proofs.setdefault(_plain(address), _Proof(name, time.monotonic()))

    def is_proven(self, address: Address) -> bool:
        """Whether the connection with this other end is one of those to keep."""
        with self._lock:
            return _plain(address) in self._proofs

    def _watch(self) -> None:
        while not self._stopped.wait(_LOOKS_EVERY):
            self._look(time.monotonic())

    def _look(self, now: float) -> None:
        """Let go whoever is one too many; the look began at `now` (monotonic seconds)."""
        there = {one.address: one for one in _connections(self._port)}
        # One that was shut down counts no more, even if its owner takes its time to close it.
        self._ended &= {one.inode for one in there.values()}
        there = {address: one for address, one in there.items() if one.inode not in self._ended}
        with self._lock:
            # Who came during the look may have proven itself already, and is only seen by the next one.
            self._proofs = {
                address: proof for address, proof in self._proofs.items() if address in there or proof.made_at >= now
            }
            names = {address: proof.name for address, proof in self._proofs.items()}
            self._since = {address: self._since.get(address, now) for address in there}
            unwanted = set(_unwanted(self._since, names, self._limits, now))
        for address in unwanted:
            _shut_down(there[address])
            self._ended.add(there[address].inode)
        self._tell(unwanted, now)

    def _tell(self, let_go: Iterable[Address], now: float) -> None:
        self._let_go.update(host for host, _ in let_go)
        if not self._let_go or now - self._told_at < _TELLS_EVERY:
            return
        hosts = ", ".join(f"{host} ({count})" for host, count in self._let_go.most_common(_HOSTS_NAMED))
        _log.warning("port %d: connections let go, too many or without proof, by origin: %s", self._port, hosts)
        self._let_go.clear()
        self._told_at = now


def raise_descriptor_limit() -> None:
    """Let this process open as many descriptors as the system allows it: the usual 1,024 are soon taken."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # some systems name a limit that they do not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _unwanted(
    since: Mapping[Address, float], names: Mapping[Address, str | None], limits: ConnectionLimits, now: float
) -> Iterator[Address]:
    """The connections to let go, of those that were first seen at `since`."""
    by_host: defaultdict[str, list[Address]] = defaultdict(list)
    by_name: defaultdict[str, list[Address]] = defaultdict(list)
    for address in sorted(since, key=lambda one: since[one]):
        if address not in names:
            if now - since[address] > limits.proves_within:
                yield address
            else:
                by_host[_network(address[0])].append(address)
        elif (name := names[address]) is not None:
            by_name[name].append(address)
    for group in by_host.values():
        yield from group[: -limits.unproven_by_host]
    for group in by_name.values():
        yield from group[: -limits.by_name]
    # Of what is left only: what one origin has too many must cost no other its place.
    left = [address for group in by_host.values() for address in group[-limits.unproven_by_host :]]
    yield from sorted(left, key=lambda one: since[one])[: -limits.unproven]


def _network(host: str) -> str:
    """What counts as one origin: an IPv4 address, or the IPv6 network that one subscriber has."""
    address = ipaddress.ip_address(host.partition("%")[0])
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else host


def _plain(address: Address) -> Address:
    """The address as `_connections` tells it: one of IPv4 that a socket of IPv6 accepted is one of IPv4."""
    return address[0].removeprefix("::ffff:"), address[1]


def _connections(port: int) -> Iterator[_Connection]:
    """The connections that this process has accepted at a port."""
    for descriptor in _open_descriptors():
        with suppress(OSError):  # it was closed meanwhile, or is no connection
            status = os.fstat(descriptor)
            if not stat.S_ISSOCK(status.st_mode):
                continue
            with _borrowed(descriptor) as connection:
                here = connection.getsockname()
                if isinstance(here, tuple) and here[1] == port:
                    yield _Connection(_plain(connection.getpeername()[:2]), descriptor, status.st_ino)


def _open_descriptors() -> Iterable[int]:
    try:
        return sorted(int(name) for name in os.listdir(_DESCRIPTORS))
    except OSError:  # not one is left to read the list with
        return range(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], _MOST_LOOKED_AT))


@contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """Another's socket, to look at. A second descriptor of it would outlive the first, and its owner's epoll entry."""
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=descriptor)
    try:
        yield connection
    finally:
        connection.detach()


def _shut_down(one: _Connection) -> None:
    with suppress(OSError), _borrowed(one.descriptor) as connection:
        if os.fstat(one.descriptor).st_ino == one.inode:  # its owner may have closed it, and opened another
            connection.shutdown(socket.SHUT_RDWR)
