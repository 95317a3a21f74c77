"""The operator's calls to a running SuperLink: register a site, start and stop a run, list both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab

from flower_transport.bundle import RUN_ID, bundle_hash, packed_bundle
from flower_transport.operator import Operator, ask


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
        return int(ask(lambda: self._client.RegisterNode(request)).node_id)

    def nodes(self) -> list[Node]:
        """The sites that may connect."""
        nodes = ask(lambda: self._client.ListNodes(ListNodesRequest())).nodes_info
        return [Node(node.node_id, node.public_key, node.status) for node in nodes if node.status != "unregistered"]

    def start(self, run_id: str) -> int:
        """Have the SuperLink make a task of carrying out a run; returns Flower's own number of the run."""
        bundle = packed_bundle()
        request = StartRunRequest(
            fab=fab_to_proto(Fab(bundle_hash(bundle), bundle, {})),
            override_config=user_config_to_proto({RUN_ID: run_id}),
        )
        return int(ask(lambda: self._client.StartRun(request)).run_id)

    def stop(self, flower_run: int) -> None:
        """End a run as Flower knows it."""
        ask(lambda: self._client.StopRun(StopRunRequest(run_id=flower_run)))

    def active(self) -> dict[str, list[int]]:
        """Run id: Flower's numbers of it, of all that Flower has not finished."""
        runs: dict[str, list[int]] = {}
        for number, run in ask(lambda: self._client.ListRuns(ListRunsRequest())).run_dict.items():
            if run.status.status != "finished" and RUN_ID in run.override_config:
                runs.setdefault(run.override_config[RUN_ID].string, []).append(number)
        return runs


@contextmanager
def control(operator: Operator) -> Iterator[Control]:
    """A connection to the operator's SuperLink. Raises InputError when certificate or credential are unusable."""
    client = operator.client(ControlHttpClient, "flwr CLI")
    try:
        yield Control(client)
    finally:
        client.close()
