"""What a peer or a stranger may do to a node over the real wire: it is refused by true name, and the round goes on."""

import asyncio
import hashlib
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import grpc
import numpy as np
import pytest

from core_training import __version__
from core_training.foundation.errors import InputError, ProtocolError
from core_training.foundation.state import Manifest, TrainableState
from core_training.runs.run_folder import RunFolder
from p2p import gossip_pb2 as wire
from p2p import membership
from p2p.grpc_transport import GrpcServer, GrpcTransport, Identity
from p2p.messages import Hello, UpdateHeader
from p2p.node import take_part
from p2p.plan import RunPlan
from p2p.roster import Member, SignedRoster
from p2p.service import PeerService
from p2p.transfer import split
from p2p.transport import PeerUnreachable
from security.certificates import create_node_certificate
from strategies.fedavg import most_weight
from tests.p2p.conftest import free_port
from tests.p2p.linear_site import LinearSite, recipe_of

pytestmark = pytest.mark.slow  # they wait for deadlines
SITE = LinearSite(7)
RECIPE = recipe_of(rounds=2)
SOUND = SITE.train_from(SITE.initial(), 3)


def identity_in(folder, name, **options):
    files = create_node_certificate(folder / name, name, **options)
    return Identity(name, files.certificate.read_bytes(), files.key.read_bytes())


def roster_of(*identities):
    members = [
        Member(name=one.name, address=f"127.0.0.1:{free_port()}", certificate=one.certificate.decode())
        for one in identities
    ]
    return SignedRoster(members=members)


def hello_from(sender, **changes):
    return Hello(
        run_id="run", sender=sender, version=__version__, recipe_digest=RECIPE.engine_digest,
        manifest_digest=SITE.manifest.digest, initial_digest=SITE.initial().digest, committed=0, contributors=[],
        state_digest="", working=0, working_seconds=0.0, round_seconds=0.0, catching_up=False, finished=False,
        train_examples=20, processes=1,
    ).model_copy(update=changes)  # fmt: skip


@dataclass
class Fault:
    """An update that differs from a right one in one thing, and the reason that must be given."""

    name: str
    reason: str
    header: dict = field(default_factory=dict)
    payload: bytes = field(default_factory=SOUND.to_bytes)
    parts: list | None = None

    def wire_parts(self):
        """The serialised parts of the stream."""
        if self.parts is not None:
            return self.parts
        return header_and(split(self.payload), self.payload, **self.header)


def header_and(chunks, payload, **changes):
    fields = {
        "run_id": "run", "round": 1, "sender": "beta", "manifest_digest": SITE.manifest.digest, "weight": 20.0,
        "degree": 1, "size": len(payload), "sha256": hashlib.sha256(payload).hexdigest(), **changes,
    }  # fmt: skip
    header = wire.UpdatePart(header=wire.UpdateHeader(**fields)).SerializeToString()
    return [header, *(wire.UpdatePart(chunk=chunk).SerializeToString() for chunk in chunks)]


def with_value(value):
    buffer = SOUND.buffer.copy()
    buffer[3] = value
    return TrainableState(SITE.manifest, buffer).to_bytes()


OTHER_SHAPE = TrainableState(Manifest.of({"bias": (1,), "weight": (5,)}), np.zeros(6, dtype=np.float32)).to_bytes()
OTHER_NAME = TrainableState(Manifest.of({"bias": (1,), "waist": (6,)}), np.zeros(7, dtype=np.float32)).to_bytes()
MOST = SITE.manifest.max_message_bytes
MOST_WEIGHT = most_weight(RECIPE, 3, rows=RECIPE.training.per_device_train_batch_size)

FAULTS = {
    "header": [
        Fault("another sender's name", "it says it comes from 'alpha'", {"sender": "alpha"}),
        Fault("another run", "belongs to run 'other'", {"run_id": "other"}),
        Fault("another manifest", "manifest is another one", {"manifest_digest": "0" * 64}),
        Fault("weight 0", "weight 0.0", {"weight": 0.0}),
        Fault("negative weight", "weight -5.0", {"weight": -5.0}),
        Fault("weight NaN", "weight nan", {"weight": float("nan")}),
        Fault("absurd weight", "that of a round lies in", {"weight": 1e15}),
        Fault(
            "more weight than its records can have",
            "it announced 20 records and 1 process",
            {"weight": MOST_WEIGHT + 1.0},
        ),
    ],
    "content": [
        Fault("NaN", "NaN or infinite", payload=with_value(np.nan)),
        Fault("Inf", "NaN or infinite", payload=with_value(np.inf)),
        Fault("another shape", "tensor 'weight' is float32", payload=OTHER_SHAPE),
        Fault("another tensor", "unknown tensor 'waist'", payload=OTHER_NAME),
        Fault("no safetensors", "not a safetensors file", payload=b"\x00" * 60),
        Fault("a size over the limit", f"a state takes at most {MOST}", {"size": MOST + 1}),
        Fault("more than announced", "more than the 10 bytes", {"size": 10}),
        Fault("less than announced", "bytes came where", {"size": MOST}),
        Fault("another content", "SHA-256", {"sha256": "0" * 64}),
    ],
    "stream": [
        Fault("no run id", "garbage", {"run_id": ""}),
        Fault("garbage at first", "garbage", parts=[b"\xff\xfe\xfd garbage"]),
        Fault("garbage after the header", "garbage", parts=[header_and([], SOUND.to_bytes())[0], b"\xff\xfe garbage"]),
        Fault("a chunk before the header", "garbage", parts=[wire.UpdatePart(chunk=b"x").SerializeToString()]),
    ],
}
"""By what is wrong. Those of one kind come to one node, one after the other."""


@pytest.fixture(autouse=True)
def _soon_down(monkeypatch):
    """Beta answers no calls; alpha need not wait for long to see it."""
    monkeypatch.setattr(membership, "DOWN_AFTER_SECONDS", 0.2)


class World:
    """A real node 'alpha' behind a real port, and the means of a peer 'beta' that holds a roster certificate."""

    def __init__(self, folder, recipe=RECIPE):
        self.recipe = recipe
        self.alpha, self.beta = identity_in(folder, "alpha"), identity_in(folder, "beta")
        self.roster = roster_of(self.alpha, self.beta)
        self.folder = RunFolder(folder / "run")
        self.trained = asyncio.Event()

    @asynccontextmanager
    async def running(self):
        """Alpha trains its first round until `trained` is set."""

        async def ask(order):
            if order.kind == "train":
                await self.trained.wait()
            return SITE.handle(order)

        service = PeerService()
        server = GrpcServer(self.alpha, self.roster, service)
        await server.start(self.roster.member("alpha").address)
        alpha = GrpcTransport(self.alpha, self.roster, 30.0)
        beta = GrpcTransport(self.beta, self.roster, 30.0)
        plan = RunPlan("alpha", ("alpha", "beta"), "run", self.recipe, "secret")
        self.node = asyncio.create_task(take_part(plan, service, alpha, ask, self.folder, linger=0.1))
        try:
            yield beta
            self.trained.set()
            await asyncio.wait_for(self.node, 30)
        finally:
            self.node.cancel()
            await beta.close()
            await alpha.close()
            await server.stop()

    def refusals(self):
        return [(event["peer"], event["reason"]) for event in self.folder.lines("refused")]


async def greet(beta, recipe=RECIPE):
    """Greet alpha until it works on its first round."""
    for _ in range(200):
        try:
            if (await beta.greet("alpha", hello_from("beta", recipe_digest=recipe.engine_digest))).working == 1:
                return
        except PeerUnreachable:
            pass
        await asyncio.sleep(0.02)
    raise AssertionError("alpha does not begin")


async def send(channel, parts, method="Publish"):
    async def stream():
        for part in parts:
            yield part

    return await channel.stream_unary(f"/fedloom.p2p.Gossip/{method}")(stream(), timeout=20)


@pytest.mark.parametrize("kind", FAULTS)
def test_a_bad_update_is_refused_with_the_reason_and_the_true_name(tmp_path, kind):
    world = World(tmp_path)

    async def scenario():
        async with world.running() as beta:
            await greet(beta)
            for fault in FAULTS[kind]:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await send(beta._channel("alpha"), fault.wire_parts())
                assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION, fault.name
                assert fault.reason in refused.value.details(), fault.name

    asyncio.run(scenario())
    told = world.refusals()
    assert [peer for peer, _ in told] == ["beta"] * len(FAULTS[kind])
    for fault, (_, reason) in zip(FAULTS[kind], told, strict=True):
        assert fault.reason in reason, fault.name
    rounds = list(world.folder.lines("epoch"))
    assert [event["contributors"] for event in rounds] == [["alpha"], ["alpha"]]


def test_a_sound_update_by_the_same_means_is_averaged(tmp_path):
    world = World(tmp_path)

    async def scenario():
        async with world.running() as beta:
            await greet(beta)
            await send(beta._channel("alpha"), Fault("none", "").wire_parts())

    asyncio.run(scenario())
    assert world.refusals() == []
    assert next(world.folder.lines("epoch"))["contributors"] == ["alpha", "beta"]


def test_an_update_weighs_as_much_as_its_sender_said_last_that_it_has_records_for_and_what_it_said_is_told(tmp_path):
    world = World(tmp_path)
    beyond = {"weight": MOST_WEIGHT + 1.0}

    async def scenario():
        async with world.running() as beta:
            await greet(beta)
            await beta.greet("alpha", hello_from("beta", processes=2))
            await beta.greet("alpha", hello_from("beta", processes=2))
            await send(beta._channel("alpha"), Fault("none", "", beyond).wire_parts())

    asyncio.run(scenario())
    assert world.refusals() == []
    told = [(event["train_examples"], event["processes"]) for event in world.folder.lines("peer_up")]
    assert told == [(20, 1), (20, 2)]
    assert next(world.folder.lines("epoch"))["contributors"] == ["alpha", "beta"]


def test_where_the_recipe_says_the_weights_nobodys_records_count(tmp_path):
    recipe = RECIPE.model_copy(update={"aggregation": RECIPE.aggregation.model_copy(update={"weights": "equal"})})
    world = World(tmp_path, recipe)

    async def scenario():
        async with world.running() as beta:
            await greet(beta, recipe)
            await beta.greet("alpha", hello_from("beta", recipe_digest=recipe.engine_digest, train_examples=1))
            await send(beta._channel("alpha"), Fault("none", "", {"weight": 1.0}).wire_parts())

    asyncio.run(scenario())
    assert world.refusals() == []


def group_parts(payload=bytes(16), **changes):
    """The serialised parts of a message that says: beta waits for a group."""
    fields = {
        "run_id": "run", "sender": "beta", "round": 1, "attempt": 0, "members": [], "phase": "here",
        "size": len(payload), "sha256": hashlib.sha256(payload).hexdigest(), **changes,
    }  # fmt: skip
    header = wire.GroupPart(header=wire.GroupHeader(**fields)).SerializeToString()
    return [header, wire.GroupPart(chunk=payload).SerializeToString()]


GROUP_FAULTS = {
    "another sender's name": (group_parts(sender="alpha"), "it says it comes from 'alpha'"),
    "another run": (group_parts(run_id="other"), "belongs to another run"),
    "no phase of the protocol": (group_parts(phase="there"), "garbage"),
    "a member's name that is none": (group_parts(members=["../x"]), "garbage"),
    "more bytes than the phase has": (group_parts(size=1 << 40), "bytes where 16 are right"),
    "another content": (group_parts(sha256="0" * 64), "SHA-256"),
    "garbage at first": ([b"\xff\xfe\xfd garbage"], "garbage"),
    "garbage after the header": ([group_parts()[0], b"\xff\xfe garbage"], "garbage"),
    "a chunk before the header": (group_parts()[1:], "garbage"),
}


def test_a_bad_group_message_is_refused_with_the_reason_and_the_true_name(tmp_path):
    recipe = recipe_of(rounds=1, deadline=3.0, privacy={"codec": "ring16", "clip": 16.0})
    world = World(tmp_path, recipe)

    async def scenario():
        async with world.running() as beta:
            await greet(beta, recipe)
            for fault, (parts, reason) in GROUP_FAULTS.items():
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await send(beta._channel("alpha"), parts, "Exchange")
                assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION, fault
                assert reason in refused.value.details(), fault

    asyncio.run(scenario())
    assert [peer for peer, _ in world.refusals()] == ["beta"] * len(GROUP_FAULTS)
    assert [event["contributors"] for event in world.folder.lines("epoch")] == [["alpha"]]


def test_where_the_run_has_groups_an_update_for_a_neighbour_is_refused(tmp_path):
    recipe = recipe_of(rounds=1, deadline=3.0, privacy={"codec": "ring16", "clip": 16.0})
    world = World(tmp_path, recipe)

    async def scenario():
        async with world.running() as beta:
            await greet(beta, recipe)
            with pytest.raises(grpc.aio.AioRpcError, match="this run's updates go to a group"):
                await send(beta._channel("alpha"), Fault("none", "").wire_parts())

    asyncio.run(scenario())
    assert [peer for peer, _ in world.refusals()] == ["beta"]


def test_where_the_run_has_no_groups_a_group_message_is_refused(tmp_path):
    world = World(tmp_path)

    async def scenario():
        async with world.running() as beta:
            await greet(beta)
            with pytest.raises(grpc.aio.AioRpcError, match="another run"):
                await send(beta._channel("alpha"), group_parts(), "Exchange")

    asyncio.run(scenario())


@pytest.mark.parametrize("number", [3, 1000])
def test_an_update_of_a_round_out_of_turn_is_not_taken(tmp_path, number):
    world = World(tmp_path)

    async def scenario():
        async with world.running() as beta:
            await greet(beta)
            receipt = wire.Receipt.FromString(
                await send(beta._channel("alpha"), Fault("", "", {"round": number}).wire_parts())
            )
            assert (receipt.accepted, receipt.committed) == (False, 0)

    asyncio.run(scenario())
    assert "stale or early" in world.refusals()[0][1]


def test_a_message_over_grpcs_limit_is_refused_before_it_is_read(tmp_path):
    world = World(tmp_path)

    async def scenario():
        async with world.running() as beta:
            await greet(beta)
            credentials = grpc.ssl_channel_credentials(world.alpha.certificate, world.beta.key, world.beta.certificate)
            options = [("grpc.ssl_target_name_override", "alpha"), ("grpc.max_send_message_length", -1)]
            channel = grpc.aio.secure_channel(world.roster.member("alpha").address, credentials, options)
            payload = bytes(5_000_000)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await send(channel, header_and([payload], payload, size=MOST))
            await channel.close()
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    asyncio.run(scenario())
    assert len(list(world.folder.lines("epoch"))) == 2
    assert world.refusals()[0][0] == "beta"


def test_a_stranger_and_an_expired_member_get_no_connection_and_the_true_member_does(tmp_path):
    alpha, beta = identity_in(tmp_path, "alpha"), identity_in(tmp_path, "beta")
    late = identity_in(tmp_path, "late", days=10, now=datetime.now(UTC) - timedelta(days=20))
    stranger = identity_in(tmp_path / "elsewhere", "beta")
    roster = roster_of(alpha, beta, late)

    async def scenario():
        service = PeerService()
        server = GrpcServer(alpha, roster, service)
        await server.start(roster.member("alpha").address)
        reasons = {}
        for title, identity in {"true": beta, "stranger": stranger, "expired": late}.items():
            transport = GrpcTransport(identity, roster, 5.0)
            with pytest.raises(PeerUnreachable) as unreachable:
                await transport.greet("alpha", hello_from(identity.name))
            reasons[title] = str(unreachable.value)
            await transport.close()
        await server.stop()
        return reasons

    reasons = asyncio.run(scenario())
    assert "still starting" in reasons["true"]
    assert "still starting" not in reasons["stranger"]
    assert "still starting" not in reasons["expired"]


def test_whoever_answers_at_a_members_address_without_its_key_is_not_believed(tmp_path):
    alpha, beta, false_beta = (identity_in(tmp_path / str(n), name) for n, name in enumerate(["alpha", "beta", "beta"]))
    roster = roster_of(alpha, beta)

    async def scenario():
        false_member = roster.member("beta").model_copy(update={"certificate": false_beta.certificate.decode()})
        false_roster = SignedRoster(members=[roster.member("alpha"), false_member])
        server = GrpcServer(false_beta, false_roster, PeerService())
        await server.start(roster.member("beta").address)
        transport = GrpcTransport(alpha, roster, 5.0)
        with pytest.raises(PeerUnreachable, match=r"(?i)certificate|handshake|ssl"):
            await transport.greet("beta", hello_from("alpha"))
        await transport.close()
        await server.stop()

    asyncio.run(scenario())


def test_a_member_cannot_sign_certificates_for_others(tmp_path):
    """A roster certificate is no authority: one that a member issued opens nothing."""
    from cryptography import x509

    certificate = x509.load_pem_x509_certificate(identity_in(tmp_path, "beta").certificate)
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign is False


def test_noise_on_the_port_harms_nobody(tmp_path):
    world = World(tmp_path)

    async def scenario():
        async with world.running() as beta:
            host, _, port = world.roster.member("alpha").address.rpartition(":")
            for noise in (b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 100):
                with socket.create_connection((host, int(port))) as connection:
                    connection.sendall(noise)
            await greet(beta)
            await send(beta._channel("alpha"), Fault("none", "").wire_parts())

    asyncio.run(scenario())
    assert next(world.folder.lines("epoch"))["contributors"] == ["alpha", "beta"]


def test_a_peer_that_answers_with_noise_counts_as_down(tmp_path):
    alpha, beta = identity_in(tmp_path, "alpha"), identity_in(tmp_path, "beta")
    roster = roster_of(alpha, beta)

    async def noise(reader, writer):
        writer.write(b"\x16\x03noise" * 100)
        writer.close()

    async def scenario():
        host, _, port = roster.member("beta").address.rpartition(":")
        server = await asyncio.start_server(noise, host, int(port))
        transport = GrpcTransport(alpha, roster, 5.0)
        with pytest.raises(PeerUnreachable):
            await transport.greet("beta", hello_from("alpha"))
        await transport.close()
        server.close()

    asyncio.run(scenario())


def test_a_greeting_in_anothers_name_is_refused(tmp_path):
    world = World(tmp_path)

    async def scenario():
        async with world.running() as beta:
            await greet(beta)
            with pytest.raises(ProtocolError, match="it says it is 'alpha'"):
                await beta.greet("alpha", hello_from("alpha"))

    asyncio.run(scenario())
    assert world.refusals()[0][0] == "beta"


def test_an_update_from_one_who_trains_something_else_is_refused(tmp_path):
    world = World(tmp_path)

    async def scenario():
        async with world.running() as beta:
            await greet(beta)
            await beta.greet("alpha", hello_from("beta", initial_digest="0" * 64))
            header = UpdateHeader.read(
                {"run_id": "run", "round": 1, "sender": "beta", "manifest_digest": SITE.manifest.digest, "weight": 1.0,
                 "degree": 1, "size": 0, "sha256": "0" * 64}
            )  # fmt: skip
            with pytest.raises(ProtocolError, match="another start"):
                await beta.publish("alpha", header, [])

    asyncio.run(scenario())
    assert "another start" in next(world.folder.lines("peer_refused"))["reason"]


def test_a_second_server_on_the_port_is_refused(tmp_path):
    alpha, beta = identity_in(tmp_path, "alpha"), identity_in(tmp_path, "beta")
    roster = roster_of(alpha, beta)
    address = roster.member("alpha").address

    async def scenario():
        first, second = GrpcServer(alpha, roster, PeerService()), GrpcServer(alpha, roster, PeerService())
        await first.start(address)
        with pytest.raises(InputError, match=f"{address}: the port is in use"):
            await second.start(address)
        await first.stop()

    asyncio.run(scenario())
