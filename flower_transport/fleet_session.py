"""A site's session with its server: a client that signs with the site's key, and the end of one left open.

Without that end, Flower lets no new SuperNode of the site in until the old session times out, a minute later.
"""

from __future__ import annotations

from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from security.private_files import read_private_file


def fleet_client(
    server: str, authority: Path, key: ec.EllipticCurvePrivateKey, *interceptors: ProtobufClientInterceptor
) -> FleetHttpClient:
    """A client of the server at HOST:PORT, known by a certificate of `authority`, for the site with this key."""
    signing = [RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())]
    return FleetHttpClient.from_server_address(server, False, str(authority), [*signing, *interceptors])


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
