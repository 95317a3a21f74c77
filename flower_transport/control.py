"""The operator's calls to a running SuperLink: register a site, start and stop a run, list both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from core_training.foundation.errors import InputError, RunError
from flower_transport.bundle import BUNDLE, RUN_ID

_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Node:
    """A site as Flower knows it: its number, its public key (PEM), and registered (never seen), online or offline."""

    node_id: int
    public_key: bytes
    status: str


class Control:
    """A connection to the SuperLink's Control API. Failures are raised as RunError."""

    def __init__(self, client: ControlHttpClient) -> None:
        self._client = client

    def register(self, public_key: bytes, name: str) -> int:
        """The node number of the site with this public key (PEM), which may connect from now on."""
        request = RegisterNodeRequest(public_key=public_key, name=name)
        return int(self._call(lambda: self._client.RegisterNode(request)).node_id)

    def nodes(self) -> list[Node]:
        """The sites that may connect."""
        nodes = self._call(lambda: self._client.ListNodes(ListNodesRequest())).nodes_info
        return [Node(node.node_id, node.public_key, node.status) for node in nodes if node.status != "unregistered"]

    def start(self, run_id: str, bundled: Mapping[str, bytes] = BUNDLE) -> int:
        """Have the SuperLink start the ServerApp for a run; returns Flower's own number of it."""
        bundle, _ = build_fab_from_files(bundled)
        request = StartRunRequest(
            fab=fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})),
            override_config=user_config_to_proto({RUN_ID: run_id}),
        )
        return int(self._call(lambda: self._client.StartRun(request)).run_id)

    def stop(self, flower_run: int) -> None:
        """End a run as Flower knows it."""
        self._call(lambda: self._client.StopRun(StopRunRequest(run_id=flower_run)))

    def active(self) -> dict[str, list[int]]:
        """Run id: Flower's numbers of it, of all that Flower has not finished."""
        runs: dict[str, list[int]] = {}
        for number, run in self._call(lambda: self._client.ListRuns(ListRunsRequest())).run_dict.items():
            if run.status.status != "finished" and RUN_ID in run.override_config:
                runs.setdefault(run.override_config[RUN_ID].string, []).append(number)
        return runs

    def _call(self, request: Callable[[], _Answer]) -> _Answer:
        try:
            return request()
        except httpx.HTTPStatusError as error:
            known = FlowerError.from_json(error.response.text)
            raise RunError(f"the SuperLink refused: {known.message if known else error.response.text}") from None
        except httpx.HTTPError as error:
            raise RunError(f"the SuperLink does not answer: {error}") from None


@contextmanager
def control(address: str, authority: Path) -> Iterator[Control]:
    """A connection to the SuperLink at `address`, whose certificate `authority` signed.

    Raises InputError when the authority's certificate is unusable.
    """
    try:
        certificate = authority.read_bytes()
    except OSError as error:
        raise InputError(f"{authority}: cannot be read: {error.strerror}") from None
    client = ControlHttpClient.from_server_address(
        server_address=address,
        insecure=False,
        root_certificates=certificate,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    try:
        yield Control(client)
    finally:
        client.close()
