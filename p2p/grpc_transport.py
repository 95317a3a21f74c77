"""Gossip over gRPC with mutual TLS. Trust is exactly the roster: who holds none of its certificates gets no connection.

A peer's name is that of the roster member whose certificate it proved to hold; what it writes into a message does not
count. Knows nothing of rounds.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote

import core_training.foundation.environment  # noqa: F401  # isort: skip - before gRPC is imported, which reads it
import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtobufMessage

from core_training.foundation.errors import InputError, ProtocolError
from p2p import gossip_pb2 as wire
from p2p.messages import GroupHeader, Hello, PeerMessage, Receipt, StateRequest, UpdateHeader
from p2p.roster import SignedRoster
from p2p.transport import CHUNK_BYTES, Handler, PeerUnreachable
from security.connection_watch import Address, ConnectionLimits, ConnectionWatch, raise_descriptor_limit

FAILED = "this node could not answer; its own log says why"

_log = logging.getLogger(__name__)

_SERVICE = "fedloom.p2p.Gossip"
_GREETING_SECONDS = 5.0
_MOST_MESSAGE_BYTES = CHUNK_BYTES + (64 << 10)
_COMMON_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", _MOST_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MOST_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
]
_CHANNEL_OPTIONS = [
    *_COMMON_OPTIONS,
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]
_LIMITS = ConnectionLimits(by_name=8)
_SERVER_OPTIONS = [
    *_COMMON_OPTIONS,
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.server_handshake_timeout_ms", int(_LIMITS.proves_within * 1000)),
    ("grpc.max_concurrent_streams", 16),
]
_CONNECTIONS_OF_A_BURST = 1_024
"""Connections beyond those of the members that gRPC accepts before the watch has looked; it closes more at once."""

_REFUSALS = {
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
}


_PLAIN = (str, bytes, int, float, bool)
_Kind = TypeVar("_Kind", bound=PeerMessage)
_Part = TypeVar("_Part", wire.UpdatePart, wire.GroupPart)


@dataclass(frozen=True)
class Identity:
    """A node's proof of its name: its certificate and private key (PEM)."""

    name: str
    certificate: bytes
    key: bytes


class GrpcTransport:
    """The calling side: a `Transport` over one channel to each peer."""

    def __init__(self, identity: Identity, roster: SignedRoster, transfer_seconds: float) -> None:
        self._identity = identity
        self._roster = roster
        self._transfer_seconds = transfer_seconds
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def greet(self, peer: str, hello: Hello) -> Hello:
        call = self._channel(peer).unary_unary(
            f"/{_SERVICE}/Greet", wire.Hello.SerializeToString, _tolerant(wire.Hello)
        )
        with _failures_of(peer):
            return Hello.read(_fields(await call(wire.Hello(**hello.model_dump()), timeout=_GREETING_SECONDS)))

    async def publish(self, peer: str, header: UpdateHeader, chunks: Iterable[bytes]) -> Receipt:
        call = self._channel(peer).stream_unary(
            f"/{_SERVICE}/Publish", wire.UpdatePart.SerializeToString, _tolerant(wire.Receipt)
        )
        with _failures_of(peer):
            parts = _parts(wire.UpdatePart, wire.UpdatePart(header=wire.UpdateHeader(**header.model_dump())), chunks)
            return Receipt.read(_fields(await call(parts, timeout=self._transfer_seconds)))

    async def fetch(self, peer: str, request: StateRequest) -> AsyncGenerator[bytes, None]:
        call = self._channel(peer).unary_stream(
            f"/{_SERVICE}/Fetch", wire.StateRequest.SerializeToString, _tolerant(wire.Chunk)
        )
        with _failures_of(peer):
            async for chunk in call(wire.StateRequest(**request.model_dump()), timeout=self._transfer_seconds):
                yield bytes(_fields(chunk)["data"])

    async def exchange(self, peer: str, header: GroupHeader, chunks: Iterable[bytes]) -> Receipt:
        call = self._channel(peer).stream_unary(
            f"/{_SERVICE}/Exchange", wire.GroupPart.SerializeToString, _tolerant(wire.Receipt)
        )
        with _failures_of(peer):
            parts = _parts(wire.GroupPart, wire.GroupPart(header=wire.GroupHeader(**header.model_dump())), chunks)
            return Receipt.read(_fields(await call(parts, timeout=self._transfer_seconds)))

    async def close(self) -> None:
        """Close all channels."""
        for channel in self._channels.values():
            await channel.close(None)

    def _channel(self, peer: str) -> grpc.aio.Channel:
        if peer not in self._channels:
            member = self._roster.member(peer)
            credentials = grpc.ssl_channel_credentials(
                member.certificate.encode(), self._identity.key, self._identity.certificate
            )
            options = [*_CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", peer)]
            self._channels[peer] = grpc.aio.secure_channel(member.address, credentials, options)
        return self._channels[peer]


class GrpcServer:
    """The answering side: takes calls from roster members and gives them to a `Handler`."""

    def __init__(self, identity: Identity, roster: SignedRoster, handler: Handler) -> None:
        self._handler = handler
        self._names = {
            _fingerprint(member.certificate.encode()): member.name
            for member in roster.members
            if member.name != identity.name
        }
        self._credentials = grpc.ssl_server_credentials(
            [(identity.key, identity.certificate)],
            "".join(member.certificate for member in roster.members).encode(),
            require_client_auth=True,
        )
        self._server: grpc.aio.Server | None = None
        self._watch: ConnectionWatch | None = None

    async def start(self, listen: str) -> None:
        """Listen on HOST:PORT. Raises InputError when the port is taken."""
        raise_descriptor_limit()
        most = _CONNECTIONS_OF_A_BURST + _LIMITS.by_name * len(self._names)
        server = grpc.aio.server(options=[*_SERVER_OPTIONS, ("grpc.max_allowed_incoming_connections", most)])
        methods = {
            "Greet": grpc.unary_unary_rpc_method_handler(
                self._greet, _tolerant(wire.Hello), wire.Hello.SerializeToString
            ),
            "Publish": grpc.stream_unary_rpc_method_handler(
                self._publish, _tolerant(wire.UpdatePart), wire.Receipt.SerializeToString
            ),
            "Fetch": grpc.unary_stream_rpc_method_handler(
                self._fetch, _tolerant(wire.StateRequest), wire.Chunk.SerializeToString
            ),
            "Exchange": grpc.stream_unary_rpc_method_handler(
                self._exchange, _tolerant(wire.GroupPart), wire.Receipt.SerializeToString
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, methods),))
        try:
            bound = server.add_secure_port(listen, self._credentials)
        except RuntimeError:
            bound = 0
        if not bound:
            raise InputError(f"cannot listen on {listen}: the port is in use, or the address is not this machine's")
        await server.start()
        self._server = server
        self._watch = ConnectionWatch(bound, _LIMITS)
        self._watch.start()

    async def stop(self) -> None:
        """Stop listening, giving calls under way a moment to end."""
        if self._server is not None and self._watch is not None:
            await self._server.stop(grace=1.0)
            self._watch.stop()

    async def _greet(self, request: wire.Hello | None, context: Any) -> wire.Hello:
        async with self._call(context) as sender:
            hello = await self._handler.on_greeting(sender, self._read(sender, Hello, request))
            return wire.Hello(**hello.model_dump())

    async def _publish(self, parts: AsyncIterator[wire.UpdatePart | None], context: Any) -> wire.Receipt:
        async with self._call(context) as sender:
            stream = aiter(parts)
            first = await anext(stream, None)
            header = self._read(sender, UpdateHeader, first.header if first is not None else None)
            receipt = await self._handler.on_update(sender, header, _chunks(stream))
            return wire.Receipt(**receipt.model_dump())

    async def _fetch(self, request: wire.StateRequest | None, context: Any) -> AsyncIterator[wire.Chunk]:
        async with self._call(context) as sender:
            async for chunk in self._handler.on_fetch(sender, self._read(sender, StateRequest, request)):
                yield wire.Chunk(data=chunk)

    async def _exchange(self, parts: AsyncIterator[wire.GroupPart | None], context: Any) -> wire.Receipt:
        async with self._call(context) as sender:
            stream = aiter(parts)
            first = await anext(stream, None)
            header = self._read(sender, GroupHeader, first.header if first is not None else None)
            receipt = await self._handler.on_group_message(sender, header, _chunks(stream))
            return wire.Receipt(**receipt.model_dump())

    @asynccontextmanager
    async def _call(self, context: Any) -> AsyncIterator[str]:
        """Yield the authenticated name of the caller; a refusal inside becomes the call's status."""
        sender = self._names.get(_fingerprint(context.auth_context()["x509_pem_cert"][0]))
        if sender is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this certificate is not in the roster")
        assert sender is not None
        assert self._watch is not None
        self._watch.prove(_address_of(context.peer()), sender)
        try:
            yield sender
        except ProtocolError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except PeerUnreachable as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except Exception:
            # It may tell where on this machine something lies.
            _log.exception("a call from '%s' could not be answered", sender)
            await context.abort(grpc.StatusCode.INTERNAL, FAILED)

    def _read(self, sender: str, kind: type[_Kind], message: ProtobufMessage | None) -> _Kind:
        try:
            return kind.read(_fields(message))
        except ProtocolError as error:
            self._handler.on_malformed(sender, f"garbage: {error}")
            raise ProtocolError(f"garbage: {error}") from None


def _parts(kind: type[_Part], first: _Part, chunks: Iterable[bytes]) -> Iterator[_Part]:
    yield first
    for chunk in chunks:
        yield kind(chunk=chunk)


async def _chunks(parts: AsyncIterator[wire.UpdatePart | wire.GroupPart | None]) -> AsyncIterator[bytes]:
    async for part in parts:
        if part is None or part.WhichOneof("part") != "chunk":
            raise ProtocolError("garbage: a part that is no chunk")
        yield part.chunk


def _tolerant(kind: type[ProtobufMessage]) -> Callable[[bytes], ProtobufMessage | None]:
    """Read a message; None for bytes that are none, so that the refusal is ours and names the sender."""

    def read(data: bytes) -> ProtobufMessage | None:
        try:
            return kind.FromString(data)
        except DecodeError:
            return None

    return read


def _fields(message: ProtobufMessage | None) -> dict[str, Any]:
    if message is None:
        raise ProtocolError("bytes that are no message of this protocol")
    values = {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
    return {name: value if isinstance(value, _PLAIN) else list(value) for name, value in values.items()}


@contextmanager
def _failures_of(peer: str) -> Iterator[None]:
    """Turn a failed call into PeerUnreachable, or into ProtocolError where the peer refused it."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        if error.code() in _REFUSALS:
            raise ProtocolError(error.details() or error.code().name) from None
        raise PeerUnreachable(f"{peer}: {error.details() or error.code().name}") from None


def _address_of(peer: str) -> Address:
    """The host and port in gRPC's name of a caller, such as `ipv4:10.0.0.1:50412` or `ipv6:%5B::1%5D:50412`."""
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    return host.strip("[]"), int(port)


def _fingerprint(pem: bytes) -> bytes:
    return x509.load_pem_x509_certificate(pem).fingerprint(hashes.SHA256())
