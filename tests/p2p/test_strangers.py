"""Who holds no certificate of the roster takes no more of a node than a few connections, for seconds."""

import asyncio
import socket
import ssl
import time
from contextlib import ExitStack, contextmanager

import pytest

import p2p.grpc_transport
from security.connection_watch import ConnectionLimits
from tests.p2p.test_bad_peers import Fault, World, greet, send

pytestmark = pytest.mark.slow  # they wait until connections are let go


@contextmanager
def strangers(address, count):
    """So many connections that never say a word; every second one stops in the middle of a TLS handshake."""
    host, _, port = address.rpartition(":")
    hello = client_hello()
    with ExitStack() as stack:
        connections = []
        for number in range(count):
            connection = stack.enter_context(socket.create_connection((host, int(port))))
            if number % 2:
                connection.sendall(hello)
            connections.append(connection)
        yield connections


def client_hello():
    """The first bytes of a TLS handshake."""
    sent = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), sent).do_handshake()
    return sent.read()


def still_open(connections):
    """How many of the connections the other side has not ended."""
    return sum(not is_ended(connection) for connection in connections)


def is_ended(connection):
    connection.setblocking(False)
    try:
        while connection.recv(65536):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


async def until(true, seconds):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


def test_silent_strangers_are_let_go_and_a_member_behind_the_same_address_takes_part(tmp_path, monkeypatch):
    monkeypatch.setattr(
        p2p.grpc_transport, "_LIMITS", ConnectionLimits(proves_within=3, unproven_by_host=8, unproven=16)
    )
    world = World(tmp_path)
    address = world.roster.member("alpha").address

    async def scenario():
        async with world.running() as beta:
            with strangers(address, 300) as connections:
                await until(lambda: still_open(connections) <= 8, 5)
                await greet(beta)
                await send(beta._channel("alpha"), Fault("none", "").wire_parts())
                await until(lambda: still_open(connections) == 0, 8)
                await greet(beta)  # by the connection that it had

    asyncio.run(scenario())
    assert next(world.folder.lines("epoch"))["contributors"] == ["alpha", "beta"]
