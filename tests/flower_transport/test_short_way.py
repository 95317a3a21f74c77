"""The short way of messages' calls: it lets in nobody whom Flower's own would not, and leaves failures to that."""

from __future__ import annotations

from typing import Any

import core_training.foundation.environment  # noqa: F401  isort: skip - before Flower is imported
import httpx
import pytest
from flwr.proto.control_pb2 import RegisterNodeRequest
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.message_pb2 import PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import FlowerError

from flower_transport.gate import OPEN_TO_OPERATOR, OPEN_TO_SITES
from flower_transport.short_way import _CALLS
from tests.contracts import test_flower as contracts

superlink = contracts.superlink
PROTOBUF = {"content-type": "application/protobuf"}


@pytest.fixture
def sites(superlink: Any) -> list[tuple[int, Any]]:
    """Two admitted sites: their numbers, and clients that sign with their keys."""
    made = []
    for name in ("one", "two"):
        key, pem = contracts.new_key()
        made.append(
            (
                superlink.control().RegisterNode(RegisterNodeRequest(public_key=pem, name=name)).node_id,
                superlink.fleet(key),
            )
        )
    return made


def test_each_call_is_one_that_the_gate_knows() -> None:
    assert _CALLS.keys() <= OPEN_TO_SITES | OPEN_TO_OPERATOR


@pytest.mark.parametrize("path", sorted(_CALLS))
def test_nobody_is_answered_who_shows_neither_key_nor_token(superlink: Any, path: str) -> None:
    answer = superlink.plain().post(path, content=b"", headers=PROTOBUF)
    assert answer.status_code in (401, 403)


def test_a_site_asks_in_its_own_name_alone(sites: list[tuple[int, Any]]) -> None:
    (one, client), (two, _) = sites
    assert list(client.PullMessages(PullMessagesRequest(node=Node(node_id=one))).messages_list) == []
    with pytest.raises(httpx.HTTPStatusError) as refused:
        client.PullMessages(PullMessagesRequest(node=Node(node_id=two)))
    assert refused.value.response.status_code == 401


def test_a_failure_is_told_in_flowers_words(sites: list[tuple[int, Any]]) -> None:
    """The run is one of an earlier SuperLink's."""
    (number, client), _ = sites
    with pytest.raises(httpx.HTTPStatusError) as refused:
        client.PullObject(PullObjectRequest(node=Node(node_id=number), run_id=1, object_id="x"))
    assert refused.value.response.status_code == 403
    assert FlowerError.from_json(refused.value.response.text) is not None


@pytest.mark.parametrize(("headers", "body"), [({}, b""), ({"content-type": "text/plain"}, b""), (PROTOBUF, b"\xff")])
def test_what_is_no_message_is_refused(superlink: Any, headers: dict[str, str], body: bytes) -> None:
    answer = superlink.plain().post("/v1/runtime/pull-messages", content=body, headers=headers)
    assert 400 <= answer.status_code < 500
