"""The end of a session that a killed SuperNode left open at the server, in the site's name and with its key.

Without this, Flower lets no new SuperNode of the site in until the old session times out, a minute later.
"""

from __future__ import annotations

from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from security.private_files import read_private_file


def end_session(server: str, authority: Path, key_file: Path, node_id: int) -> bool:
    """Tell the server that the site's node is offline. Returns whether the server took it for online until now."""
    key = load_ssh_private_key(read_private_file(key_file), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        return False
    interceptors = [RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())]
    with FleetHttpClient.from_server_address(server, False, str(authority), interceptors) as client:
        try:
            client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
        except httpx.HTTPError:
            return False
    return True
