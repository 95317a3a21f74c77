"""What a peer says, or has a node say, harms neither terminal nor disk; what a node says gives nothing away."""

import asyncio
import logging
import ssl

import pytest

from core_training.foundation.errors import ProtocolError, RunError
from core_training.runs import events
from fedloom.node_terminal import in_one_line
from p2p.grpc_transport import FAILED, GrpcServer, GrpcTransport
from p2p.messages import Hello
from p2p.service import PeerService
from p2p.transport import PeerUnreachable
from tests.p2p.test_bad_peers import Fault, World, greet, hello_from, identity_in, roster_of, send

pytestmark = pytest.mark.slow  # they wait for deadlines
HOSTILE = "\x1b[2J\x1b]0;owned\x07\nerror: all is lost\r" + "x" * 5_000


class Answering(PeerService):
    """A node that answers each greeting with an error of its own."""

    def __init__(self, error):
        super().__init__()
        self._error = error

    async def on_greeting(self, sender, hello):
        raise self._error


def answer_to_a_greeting(tmp_path, error):
    """What beta hears of alpha."""
    alpha, beta = identity_in(tmp_path, "alpha"), identity_in(tmp_path, "beta")
    roster = roster_of(alpha, beta)

    async def scenario():
        server, transport = GrpcServer(alpha, roster, Answering(error)), GrpcTransport(beta, roster, 5.0)
        await server.start(roster.member("alpha").address)
        try:
            await transport.greet("alpha", hello_from("beta"))
        finally:
            await transport.close()
            await server.stop()

    with pytest.raises((ProtocolError, PeerUnreachable)) as raised:
        asyncio.run(scenario())
    return raised.value


@pytest.mark.parametrize("kind", [ProtocolError, PeerUnreachable])
def test_a_peers_words_come_as_one_bounded_line_of_letters(tmp_path, monkeypatch, kind):
    # The peer's own fedloom would have cleaned them: this one does not.
    with monkeypatch.context() as lawless:
        lawless.setattr("core_training.foundation.errors.harmless", lambda text, *_, **__: text)
        lawless.setattr("p2p.transport.harmless", lambda text, *_, **__: text)
        error = kind(HOSTILE[:2_000])
    told = str(answer_to_a_greeting(tmp_path, error))
    assert "all is lost" in told
    assert told.isprintable()
    assert len(told) <= 1_000


@pytest.mark.parametrize(
    "error",
    [
        RunError("/srv/node/runs/x/events.jsonl cannot be written"),
        OSError(28, "No space", "/srv/node"),
        KeyError("secret"),
    ],
)
def test_a_nodes_own_failure_is_told_to_no_peer_and_in_its_log(tmp_path, caplog, error):
    told = answer_to_a_greeting(tmp_path, error)
    assert isinstance(told, PeerUnreachable)
    assert str(told) == f"alpha: {FAILED}"
    assert str(error) in caplog.text


def test_a_version_is_a_version():
    with pytest.raises(ProtocolError, match="version"):
        Hello.read({**hello_from("beta").model_dump(), "version": "1.0\x1b[2J"})


def test_a_terminal_is_shown_one_line_of_letters_for_each_event():
    for event in (events.Refused(peer="beta", reason=HOSTILE), events.PeerRefused(peer="beta", reason=HOSTILE)):
        assert in_one_line(event).isprintable()
        assert "untold" not in in_one_line(event)


def test_refused_greetings_do_not_fill_a_disk_and_are_counted(tmp_path):
    world = World(tmp_path)

    async def scenario():
        async with world.running() as beta:
            await greet(beta)
            for number in range(300):
                with pytest.raises(ProtocolError):
                    await beta.greet("alpha", hello_from(f"gamma{number}"))
                await beta.greet("alpha", hello_from("beta", initial_digest=f"{number % 2}" * 64))
                await beta.greet("alpha", hello_from("beta"))
            await greet(beta)
            await send(beta._channel("alpha"), Fault("none", "").wire_parts())

    asyncio.run(scenario())
    for kind in ("refused", "peer_refused", "peer_up"):
        lines = list(world.folder.lines(kind))
        assert 20 <= len(lines) <= 25, kind
    assert next(world.folder.lines("epoch"))["contributors"] == ["alpha", "beta"]


def test_a_full_disk_does_not_silence_a_node(tmp_path, caplog):
    world = World(tmp_path)
    world.folder.path.mkdir()
    (world.folder.path / "events.jsonl").symlink_to("/dev/full")

    async def scenario():
        async with world.running() as beta:
            await greet(beta)
            with pytest.raises(ProtocolError, match="it says it is 'alpha'"):
                await beta.greet("alpha", hello_from("alpha"))
            await send(beta._channel("alpha"), Fault("none", "").wire_parts())
        return world.node.result()

    with caplog.at_level(logging.WARNING):
        assert asyncio.run(scenario()).rounds == 2
    assert "No space left on device" in caplog.text
    assert "the node goes on" in caplog.text
    assert "it says it is 'alpha'" in caplog.text


@pytest.mark.parametrize("federation", [("alpha", "beta")], indirect=True)
def test_broken_handshakes_leave_no_line_each_in_a_nodes_log(federation):
    federation.start("alpha", "--rounds", 1)
    federation.wait_for("alpha", "waiting")
    host, _, port = federation.roster.member("alpha").address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    async def strange():
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
        writer.write(b"x")
        with pytest.raises((OSError, asyncio.IncompleteReadError)):
            await reader.readexactly(100_000)

    async def strangers():
        for _ in range(50):
            await strange()

    asyncio.run(strangers())
    assert federation.log("alpha").count("andshake") == 0
