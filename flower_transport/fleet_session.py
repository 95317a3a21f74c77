"""A site's session with its server: a client that signs with the site's key, and the end of one left open.

Without that end, Flower lets no new SuperNode of the site in until the old session times out, a minute later.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from core_training.foundation.bounded_reading import shortened
from flower_transport.limits import LARGE_BYTES
from security.private_files import read_private_file


class _FleetClient(FleetHttpClient):  # type: ignore[misc]
    """Flower's client of a server that may send anything: it takes no more into memory than an honest one sends.

    What is longer, packed, led elsewhere or no message is a broken call (httpx.HTTPError), as a line that breaks is.
    """

    def __init__(self, base_url: str, **settings: Any) -> None:
        super().__init__(base_url, **settings)
        client: httpx.Client = self._client
        client.follow_redirects = False
        client.headers["accept-encoding"] = "identity"
        client.event_hooks = {"response": [_bound]}

    def _unary_unary(self, **asked: Any) -> Any:
        try:
            return super()._unary_unary(**asked)
        except ValueError as error:
            raise httpx.RemoteProtocolError(f"the server's answer is malformed: {error}") from None


def _bound(response: httpx.Response) -> None:
    """Bound an answer whose body is not read yet. Raises RemoteProtocolError for one that would have to be unpacked."""
    if (packed := response.headers.get("content-encoding", "identity")) != "identity":
        raise httpx.RemoteProtocolError(f"the server's answer is packed ({shortened(packed)})")
    response.stream = _Bounded(response.stream)


class _Bounded(httpx.SyncByteStream):
    """A body that breaks off where it is longer than any."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        received = 0
        for piece in self._stream:
            received += len(piece)
            if received > LARGE_BYTES:
                raise httpx.RemoteProtocolError(f"the server's answer is longer than {LARGE_BYTES} bytes")
            yield piece

    def close(self) -> None:
        self._stream.close()


def fleet_client(
    server: str, authority: Path, key: ec.EllipticCurvePrivateKey, *interceptors: ProtobufClientInterceptor
) -> FleetHttpClient:
    """A client of the server at HOST:PORT, known by a certificate of `authority`, for the site with this key."""
    signing = [RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())]
    return _FleetClient.from_server_address(server, False, str(authority), [*signing, *interceptors])


def end_session(server: str, authority: Path, key_file: Path, node_id: int) -> bool:
    """Tell the server that the site's node is offline. Returns whether the server took it for online until now."""
    key = load_ssh_private_key(read_private_file(key_file), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        return False
    with fleet_client(server, authority, key) as client:
        try:
            client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
        except httpx.HTTPError:
            return False
    return True
