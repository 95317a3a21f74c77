"""Flower keeps to what we lean on besides its public interface: module paths, log lines, order, who may ask what.

A real SuperLink, in this process, and a real SuperNode with its own; no model and no process of ours.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import signal
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import core_training.foundation.environment as environment  # isort: skip - before Flower is imported
import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import ErrorCode
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
)
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, RegisterNodeFleetRequest
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import SendTaskHeartbeatResponse
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import (
    RuntimeVersionHttpInterceptor,
)
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.cli.flower_superlink import _parse_superlink_lifespan_config
from flwr.superlink.grid import HttpGrid
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from flower_transport.bells import Bells
from flower_transport.bundle import BUNDLE
from flower_transport.credential import ShowCredential, is_shown
from flower_transport.gate import OPEN_TO_OPERATOR, OPEN_TO_SITES
from flower_transport.held_calls import HoldingServer
from flower_transport.link_state import SuperLinkState
from flower_transport.message_parts import MessageParts
from flower_transport.site_proof import proven_site
from flower_transport.superlink import make_app
from security.certificates import create_authority, issue_server_certificate
from security.connection_watch import ConnectionWatch
from tests.contracts.leaning import calls_out, leans, look_up, names

NAMES = {
    "flower_transport/superlink.py": [
        "flwr.supercore.http_logging:get_uvicorn_log_config",
        "flwr.supercore.logger:console_handler.level",
        "flwr.superlink.cli.flower_superlink:SuperLinkLifespan",
        "flwr.superlink.cli.flower_superlink:_parse_superlink_lifespan_config",
        "flwr.server.superlink.linkstate:LinkStateFactory",
        "flwr.supercore.object_store:ObjectStoreFactory",
        "flwr.superlink.config_loader:SuperLinkLifespanConfig",
        "flwr.superlink.main:create_app",
        "flwr.superlink.main:get_objectstore_linkstate_factories",
    ],
    "flower_transport/bundle.py": [
        "flwr.cli.build:build_fab_from_files",
    ],
    "flower_transport/limits.py": ["flwr.common.constant:FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE"],
    "flower_transport/site_proof.py": [
        "flwr.common.constant:SYSTEM_TIME_TOLERANCE",
        "flwr.common.constant:TIMESTAMP_HEADER",
        "flwr.common.constant:TIMESTAMP_TOLERANCE",
        "flwr.supercore.constant:FLEET_HTTP_PUBLIC_KEY_HEADER",
        "flwr.supercore.constant:FLEET_HTTP_SIGNATURE_HEADER",
        "flwr.supercore.date:now",
        "flwr.supercore.primitives.asymmetric:bytes_to_public_key",
        "flwr.supercore.primitives.asymmetric:verify_signature",
    ],
    "flower_transport/gate.py": [
        "flwr.proto.control_pb2:StartRunRequest",
    ],
    "flower_transport/operator.py": [
        "flwr.supercore.error:FlowerError.from_json",
        "flwr.supercore.interceptors:RuntimeVersionHttpInterceptor",
        "flwr.supercore.protobuf.client:ProtobufClient.from_server_address",
        "flwr.supercore.protobuf.client:ProtobufClientInterceptor",
        "flwr.supercore.retry:RetryInvoker",
    ],
    "flower_transport/control.py": [
        "flwr.common.serde:fab_to_proto",
        "flwr.common.serde:user_config_to_proto",
        "flwr.proto.control_pb2:ListNodesRequest",
        "flwr.proto.control_pb2:ListRunsRequest",
        "flwr.proto.control_pb2:RegisterNodeRequest",
        "flwr.proto.control_pb2:StartRunRequest",
        "flwr.proto.control_pb2:StopRunRequest",
        "flwr.supercore.control:ControlHttpClient.from_server_address",
        "flwr.supercore.fab:Fab",
    ],
    "flower_transport/server_task.py": [
        "flwr.common.constant:SubStatus.COMPLETED",
        "flwr.common.constant:SubStatus.FAILED",
        "flwr.common.serde:context_from_proto",
        "flwr.common.serde:run_from_proto",
        "flwr.proto.runtime_pb2:AcquireTaskRequest",
        "flwr.proto.runtime_pb2:PullTaskInputRequest",
        "flwr.proto.runtime_pb2:PushTaskOutputRequest",
        "flwr.supercore.constant:TaskType.SERVER_APP",
        "flwr.supercore.heartbeat:HeartbeatSender",
        "flwr.supercore.heartbeat:make_task_heartbeat_fn_http",
        "flwr.supercore.interceptors:RuntimeTokenHttpInterceptor",
        "flwr.supercore.retry:make_simple_http_retry_invoker",
        "flwr.supercore.runtime:RuntimeHttpClient.from_server_address",
        "flwr.supercore.task_identity:TaskIdentity",
        "flwr.superlink.grid:HttpGrid",
    ],
    "flower_transport/link_state.py": [
        "flwr.common.constant:HEARTBEAT_DEFAULT_INTERVAL",
        "flwr.proto.message_pb2:ObjectTree",
        "flwr.proto.node_pb2:NodeInfo",
        "flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState._check_stored_messages",
        "flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState.acknowledge_node_heartbeat",
        "flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState.activate_node",
        "flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState.create_node",
        "flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState.deactivate_node",
        "flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState.delete_messages",
        "flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState.get_message_ins",
        "flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState.get_message_res",
        "flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState.get_run_status",
        "flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState.store_message_and_object_tree",
        "flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState.store_object",
        "flwr.supercore.constant:NodeStatus.OFFLINE",
        "flwr.supercore.constant:NodeStatus.ONLINE",
        "flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState._cleanup_push_session",
        "flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState._is_primary_task",
        "flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState._store_generated_message",
        "flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState.cleanup_run",
        "flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState.finish_task",
        "flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState.get_object",
        "flwr.server.superlink.linkstate.utils:create_message_error_unavailable_res_message",
        "flwr.supercore.date:now",
        "flwr.supercore.run:RunStatus",
        "flwr.superlink.federation:FederationManager",
    ],
    "flower_transport/message_parts.py": [
        "flwr.supercore.inflatable.inflatable_object:get_object_id",
        "flwr.supercore.inflatable.inflatable_utils:validate_object_content",
        "flwr.supercore.object_store.in_memory_object_store:InMemoryObjectStore.delete",
        "flwr.supercore.object_store.in_memory_object_store:InMemoryObjectStore.get",
        "flwr.supercore.object_store.in_memory_object_store:InMemoryObjectStore.preregister",
        "flwr.supercore.object_store.in_memory_object_store:InMemoryObjectStore.put",
        "flwr.proto.message_pb2:PullObjectRequest",
        "flwr.proto.message_pb2:PullObjectResponse",
        "flwr.proto.message_pb2:PushObjectRequest",
        "flwr.proto.message_pb2:PushObjectResponse",
        "flwr.supercore.runtime:RuntimeHttpClient.PullObject",
        "flwr.supercore.runtime:RuntimeHttpClient.PushObject",
    ],
    "flower_transport/short_way.py": [
        "flwr.supercore.constant:TASK_TOKEN_HEADER",
        "flwr.supercore.dependencies.task:authenticate_task",
        "flwr.supercore.error:FlowerError",
        "flwr.supercore.protobuf.constants:PROTOBUF_MEDIA_TYPE",
        "flwr.superlink.dependencies.linkstate:get_linkstate",
        "flwr.superlink.routers.fleet.node_auth:authenticate_node",
        "flwr.superlink.servicer.fleet:fleet_handlers.confirm_message_received",
        "flwr.superlink.servicer.fleet:fleet_handlers.pull_messages",
        "flwr.superlink.servicer.fleet:fleet_handlers.pull_object",
        "flwr.superlink.servicer.fleet:fleet_handlers.push_messages",
        "flwr.superlink.servicer.fleet:fleet_handlers.push_object",
        "flwr.superlink.servicer.runtime:runtime_handlers.confirm_message_received",
        "flwr.superlink.servicer.runtime:runtime_handlers.pull_messages",
        "flwr.superlink.servicer.runtime:runtime_handlers.pull_object",
        "flwr.superlink.servicer.runtime:runtime_handlers.push_messages",
        "flwr.superlink.servicer.runtime:runtime_handlers.push_object",
    ],
    "flower_transport/supernode.py": [
        "flwr.app.error:Error",
        "flwr.app.message:remove_content_from_message",
        "flwr.common.constant:ErrorCode.CLIENT_APP_RAISED_EXCEPTION",
        "flwr.common.constant:HEARTBEAT_DEFAULT_INTERVAL",
        "flwr.common.serde:message_from_proto",
        "flwr.common.serde:message_to_proto",
        "flwr.proto.fleet_pb2:ActivateNodeRequest",
        "flwr.proto.fleet_pb2:DeactivateNodeRequest",
        "flwr.proto.fleet_pb2:PullMessagesRequest",
        "flwr.proto.fleet_pb2:PushMessagesRequest",
        "flwr.proto.heartbeat_pb2:SendNodeHeartbeatRequest",
        "flwr.proto.message_pb2:ConfirmMessageReceivedRequest",
        "flwr.proto.message_pb2:ObjectTree",
        "flwr.proto.node_pb2:Node",
        "flwr.supercore.error:FlowerError.from_json",
        "flwr.supercore.inflatable.inflatable_object:get_all_nested_objects",
        "flwr.supercore.inflatable.inflatable_object:get_object_tree",
        "flwr.supercore.inflatable.inflatable_object:no_object_id_recompute",
        "flwr.supercore.inflatable.inflatable_protobuf_utils:make_pull_object_fn_protobuf",
        "flwr.supercore.inflatable.inflatable_protobuf_utils:make_push_object_fn_protobuf",
        "flwr.supercore.inflatable.inflatable_utils:ObjectPullError",
        "flwr.supercore.inflatable.inflatable_utils:ObjectPushError",
        "flwr.supercore.inflatable.inflatable_utils:push_objects",
        "flwr.supercore.primitives.asymmetric:public_key_to_bytes",
        "flwr.supercore.retry:RetryInvoker",
        "flwr.supercore.retry:exponential",
        "flwr.supercore.retry:make_simple_http_retry_invoker",
        "flwr.supercore.run:RunNotRunningException",
        "flwr.supercore.task_identity:TaskIdentity",
    ],
    "flower_transport/fleet_session.py": [
        "flwr.proto.fleet_pb2:DeactivateNodeRequest",
        "flwr.supercore.interceptors:RuntimeVersionHttpInterceptor",
        "flwr.supercore.protobuf.client:ProtobufClientInterceptor",
        "flwr.supernode.fleet_http_client:FleetHttpClient._unary_unary",
        "flwr.supernode.fleet_http_client:FleetHttpClient.from_server_address",
        "flwr.supernode.node_auth_http_interceptor:NodeAuthHttpInterceptor",
    ],
    "flower_transport/arrivals.py": [
        "flwr.proto.message_pb2:ConfirmMessageReceivedRequest",
        "flwr.proto.message_pb2:ObjectTree",
        "flwr.proto.runtime_pb2:PullAppMessagesRequest",
        "flwr.supercore.inflatable.inflatable_protobuf_utils:make_pull_object_fn_protobuf",
        "flwr.supercore.inflatable.inflatable_utils:ObjectPullError",
        "flwr.superlink.grid:HttpGrid._runtime_client",
        "flwr.superlink.grid:HttpGrid.run",
    ],
    "flower_transport/intake.py": [
        "flwr.app.message.arraychunk:ArrayChunk",
        "flwr.common.constant:FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE",
        "flwr.proto.message_pb2:ObjectTree",
        "flwr.supercore.inflatable.inflatable_object:get_object_body",
        "flwr.supercore.inflatable.inflatable_object:get_object_head_values_from_object_content",
        "flwr.supercore.inflatable.inflatable_object:iterate_object_tree",
        "flwr.supercore.inflatable.inflatable_utils:inflate_object_from_contents",
        "flwr.supercore.inflatable.inflatable_utils:pull_objects",
    ],
    "flower_transport/in_process.py": [
        "flwr.supercore.inflatable.inflatable_object:get_all_nested_objects",
        "flwr.supercore.inflatable.inflatable_utils:inflate_object_from_contents",
        "flwr.supercore.task_identity:TaskIdentity",
    ],
}

# --- names and places


@pytest.mark.parametrize(("file", "name"), names(NAMES), ids=str)
def test_a_name_that_is_not_public_is_where_it_was(file: str, name: str) -> None:
    look_up(file, name)


@leans("server/supervisor.py", "client/supervisor.py")
def test_flower_keeps_its_files_in_the_folder_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    assert look_up("server/supervisor.py", "flwr.supercore.utils:get_flwr_home")() == tmp_path


# --- what would call home or install


@leans("core_training/foundation/environment.py")
def test_an_event_is_sent_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    telemetry = look_up("core_training/foundation/environment.py", "flwr.supercore.telemetry:")
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    asked = calls_out(monkeypatch)
    assert environment.SETTINGS["FLWR_TELEMETRY_ENABLED"] == "0"
    telemetry.event(telemetry.EventType.PING).result(timeout=10)
    assert asked == []


@leans("core_training/foundation/environment.py")
def test_nobody_is_asked_for_a_newer_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = look_up("core_training/foundation/environment.py", "flwr.supercore.update_check:")
    started: list[str] = []
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    monkeypatch.setattr(check, "_start_flwr_update_check_refresh_thread", started.append)
    check.warn_if_flwr_update_available(process_name="ours")
    assert started == []
    monkeypatch.delenv("FLWR_DISABLE_UPDATE_CHECK")
    check.warn_if_flwr_update_available(process_name="theirs")
    assert started == ["theirs"], "the thread that would ask goes by another name"


@leans("core_training/foundation/environment.py", "server/supervisor.py")
def test_a_run_installs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "flwr.superlink.cli.flower_superlink"
    installs = look_up("server/supervisor.py", f"{module}:_runtime_dependency_install_default")
    assert not installs()
    monkeypatch.delenv("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION")
    assert installs()
    options = look_up("server/supervisor.py", f"{module}:_parse_args_run_superlink")()
    assert not options.parse_args(["--disable-runtime-dependency-installation"]).runtime_dependency_install


# --- messages


@pytest.fixture
def identity() -> Iterator[None]:
    """Who this process is to Flower: task 3 on node 2 of run 1."""
    before = {name: getattr(TaskIdentity, f"_{name}") for name in ("task_id", "run_id", "node_id")}
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 3, 1, 2
    yield
    for name, value in before.items():
        setattr(TaskIdentity, name, value)


def order(content: RecordDict | None = None, node: int = 7) -> Message:
    return Message(content or RecordDict(), dst_node_id=node, message_type="query", ttl=60.0)


def payload(data: bytes) -> RecordDict:
    return RecordDict({"payload": ArrayRecord({"payload": Array("uint8", (len(data),), "bytes", data)})})


@leans("flower_transport/in_process.py")
def test_a_message_bears_the_run_and_node_that_the_process_says_it_is(identity: None) -> None:
    metadata = order().metadata
    assert (metadata.run_id, metadata.src_node_id, metadata.dst_node_id) == (1, 2, 7)
    assert (metadata.message_type, metadata.ttl) == ("query", 60.0)


@leans("flower_transport/in_process.py", "flower_transport/grid.py")
def test_a_message_has_the_id_that_its_metadata_hold_and_an_answer_names_it(identity: None) -> None:
    message = order()
    assert message.metadata.message_id == ""
    message.metadata.__dict__["_message_id"] = message.object_id
    assert message.metadata.message_id == message.object_id
    assert message.object_id == message.metadata.message_id, "the id depends on what it is written into"
    answer = Message(RecordDict(), reply_to=message)
    assert answer.metadata.reply_to_message_id == message.object_id
    assert (answer.metadata.src_node_id, answer.metadata.dst_node_id) == (7, 2)


@leans("flower_transport/supernode.py", "flower_transport/records.py", "flower_transport/in_process.py")
def test_an_error_takes_the_place_of_an_answer(identity: None) -> None:
    message = order()
    message.metadata.__dict__["_message_id"] = message.object_id
    answer = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "why"), reply_to=message)
    assert answer.has_error()
    assert not order().has_error()
    assert answer.error.reason == "why"
    assert answer.metadata.reply_to_message_id == message.object_id


@leans("flower_transport/records.py", "flower_transport/in_process.py")
def test_a_message_in_parts_is_itself_again_and_no_part_is_as_long_as_a_payload_may_be(identity: None) -> None:
    data = bytes(range(256)) * (6 * 2**12)
    message = order(payload(data))
    parts = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
    assert message.object_id in parts
    assert max(map(len, parts.values())) < len(data), "a payload goes in one piece, whatever its length"
    carried = inflate_object_from_contents(message.object_id, parts)
    assert isinstance(carried, Message)
    assert carried.metadata.message_id == "", "a message knows its id: flower_transport/in_process.py need not set it"
    assert carried.object_id == message.object_id
    array = carried.content["payload"]["payload"]
    assert (array.dtype, array.shape, array.stype, array.data) == ("uint8", (len(data),), "bytes", data)


@leans("flower_transport/records.py")
def test_records_are_a_mapping_of_the_very_objects_that_were_put_in() -> None:
    config = ConfigRecord({"kind": "join", "fields": "{}"})
    records = RecordDict({"envelope": config})
    records["payload"] = payload(b"x")["payload"]
    assert set(records) == {"envelope", "payload"}
    assert records.get("envelope") is config
    assert records.get("other") is None
    assert list(records["payload"]) == ["payload"]


# --- the SuperLink


class Gate:
    """ASGI middleware as in flower_transport/superlink.py: notes who asks for what, and refuses who bears a mark."""

    seen: list[Scope] = []

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.seen.append(scope)
            if b"x-stranger" in dict(scope["headers"]):
                await PlainTextResponse("ours", status_code=403)(scope, receive, send)
                return
        await self._app(scope, receive, send)


@dataclass(frozen=True)
class SuperLink:
    """A SuperLink with supernode authentication, over TLS, on this machine's loopback interface."""

    folder: Path
    config: Any
    app: Any
    port: int
    clients: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def authority(self) -> Path:
        return self.folder / "ca.crt"

    def control(self) -> Any:
        return self._kept(
            ControlHttpClient.from_server_address(
                server_address=self.address,
                insecure=False,
                root_certificates=self.authority.read_bytes(),
                interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
            )
        )

    def fleet(self, key: ec.EllipticCurvePrivateKey) -> Any:
        signing = [RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())]
        return self._kept(FleetHttpClient.from_server_address(self.address, False, str(self.authority), signing))

    def plain(self) -> httpx.Client:
        """A client that proves nothing."""
        trust = ssl.create_default_context(cafile=self.authority)
        client = httpx.Client(base_url=f"https://{self.address}", verify=trust)
        self.clients.append(client)
        return client

    def runtime(self) -> Any:
        return self._kept(
            RuntimeHttpClient.from_server_address(
                server_address=self.address,
                insecure=False,
                root_certificates=self.authority.read_bytes(),
                interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")],
            )
        )

    def _kept(self, client: Any) -> Any:
        self.clients.append(client)
        return client


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    folder = tmp_path_factory.mktemp("superlink")
    create_authority(folder)
    issue_server_certificate(folder, ["127.0.0.1"])
    options = [
        *("superlink", "--host", "127.0.0.1", "--port", "9092"),
        *("--ssl-ca-certfile", str(folder / "ca.crt")),
        *("--ssl-certfile", str(folder / "server.crt"), "--ssl-keyfile", str(folder / "server.key")),
        *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        *("--isolation", "process"),
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", options)
        config = _parse_superlink_lifespan_config()
    bells = Bells()
    app = make_app(config, folder, bells, ConnectionWatch(config.port))
    app.add_middleware(Gate)
    server = HoldingServer(
        uvicorn.Config(
            app,
            host=config.host,
            port=0,
            ssl_keyfile=config.ssl_keyfile,
            ssl_certfile=config.ssl_certfile,
            log_level="warning",
            proxy_headers=False,
        ),
        bells,
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started, "the SuperLink")
    running = SuperLink(folder, config, app, server.servers[0].sockets[0].getsockname()[1])
    yield running
    for client in running.clients:
        client.close()
    server.should_exit = server.force_exit = True
    thread.join(timeout=10)


def wait_for(there: Callable[[], Any], what: str, within: float = 60.0) -> Any:
    deadline = time.monotonic() + within
    while not (found := there()):
        assert time.monotonic() < deadline, f"waited {within} s for {what}"
        time.sleep(0.02)
    return found


def new_key() -> tuple[ec.EllipticCurvePrivateKey, bytes]:
    """A site's key, and its public key as a SuperLink is told it."""
    key = ec.generate_private_key(ec.SECP384R1())
    return key, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@leans("flower_transport/superlink.py", "server/supervisor.py")
def test_a_superlink_understands_its_options(superlink: SuperLink) -> None:
    config = superlink.config
    assert (config.host, config.port) == ("127.0.0.1", 9092)
    assert config.enable_supernode_auth is True
    assert config.runtime_dependency_install is False
    assert config.ssl_certfile == str(superlink.folder / "server.crt")
    assert config.ssl_keyfile == str(superlink.folder / "server.key")
    assert config.isolation == "process", "a SuperLink starts ServerApps by itself, from bundles"
    assert superlink.app.state.superlink_lifespan.superexec_process is None
    state = superlink.app.state.linkstate_factory.state()
    assert isinstance(state, SuperLinkState), "a SuperLink has another state than the one that it was given"
    assert isinstance(state.object_store, MessageParts)


@leans("flower_transport/superlink.py")
def test_a_superlink_opens_no_other_port(superlink: SuperLink) -> None:
    """Another one would not be behind the middleware."""
    assert superlink.config.health_server_address is None
    assert superlink.app.state.superlink_lifespan.grpc_servers == []


@leans("flower_transport/gate.py")
def test_the_calls_that_fedloom_makes_are_where_it_makes_them(superlink: SuperLink) -> None:
    from fastapi.routing import iter_route_contexts

    routes: list[Any] = [context.route for context in iter_route_contexts(superlink.app.routes)]
    paths = {route.path for route in routes}
    assert paths >= OPEN_TO_SITES | OPEN_TO_OPERATOR
    assert superlink.plain().get("/health").status_code == 200


@leans("flower_transport/gate.py")
@pytest.mark.parametrize("path", sorted(OPEN_TO_SITES - {"/health"}))
def test_the_fleet_interface_answers_nobody_without_a_key(superlink: SuperLink, path: str) -> None:
    answer = superlink.plain().post(path, content=b"", headers={"content-type": "application/protobuf"})
    assert answer.status_code == 401, answer.text


@leans("flower_transport/superlink.py")
def test_a_key_does_not_let_itself_in(superlink: SuperLink) -> None:
    key, pem = new_key()
    with pytest.raises(httpx.HTTPStatusError):
        superlink.fleet(key).RegisterNode(RegisterNodeFleetRequest(public_key=pem))
    assert pem not in {node.public_key for node in superlink.control().ListNodes(ListNodesRequest()).nodes_info}


@leans("flower_transport/superlink.py")
@pytest.mark.parametrize("path", ["/v1/control/list-runs", "/v1/runtime/acquire-task", "/docs", "/nowhere"])
def test_a_middleware_of_ours_is_asked_before_flower(superlink: SuperLink, path: str) -> None:
    answer = superlink.plain().post(path, headers={"x-stranger": "1", "content-type": "application/protobuf"})
    assert (answer.status_code, answer.text) == (403, "ours")


@leans("flower_transport/site_proof.py")
def test_a_sites_calls_are_proven_by_their_headers_alone(superlink: SuperLink) -> None:
    site, stranger = new_key(), new_key()
    superlink.control().RegisterNode(RegisterNodeRequest(public_key=site[1], name="prover"))
    known = superlink.app.state.linkstate_factory.state()

    def proof(key: ec.EllipticCurvePrivateKey, pem: bytes) -> str | None:
        Gate.seen.clear()
        with contextlib.suppress(httpx.HTTPError):
            superlink.fleet(key).ActivateNode(ActivateNodeRequest(public_key=pem, heartbeat_interval=30))
        return proven_site(Headers(scope=Gate.seen[0]), known)

    assert proof(*site) == hashlib.sha256(site[1]).hexdigest()
    assert proof(*stranger) is None


@leans("flower_transport/gate.py", "flower_transport/credential.py")
def test_the_middleware_sees_the_path_and_every_header_that_was_sent(superlink: SuperLink) -> None:
    Gate.seen.clear()
    superlink.plain().get("/health", headers=[("X-Shown", "one"), ("x-shown", "two")])
    (scope,) = Gate.seen
    assert scope["path"] == "/health"
    assert [value for name, value in scope["headers"] if name == b"x-shown"] == [b"one", b"two"]


@leans("flower_transport/operator.py", "flower_transport/credential.py")
def test_a_client_sends_what_an_interceptor_of_ours_adds(superlink: SuperLink) -> None:
    Gate.seen.clear()
    showing = ShowCredential("shown")
    with ControlHttpClient.from_server_address(
        superlink.address, False, superlink.authority.read_bytes(), [showing]
    ) as client:
        client.ListRuns(ListRunsRequest())
    (scope,) = Gate.seen
    assert is_shown(scope, "shown")


@leans("flower_transport/server_task.py")
def test_a_grid_goes_by_the_client_that_it_was_given() -> None:
    grid = HttpGrid("127.0.0.1:1", token="token")
    given = SimpleNamespace()
    grid._client = given
    assert grid._runtime_client is given


@leans("flower_transport/superlink.py")
@pytest.mark.parametrize(
    "path", ["/v1/fleet/../control/list-runs", "/v1/fleet//v1/control/list-runs", "/health/../v1/control/list-runs"]
)
def test_no_detour_leads_from_what_is_open_to_what_is_closed(superlink: SuperLink, path: str) -> None:
    trust = ssl.create_default_context(cafile=superlink.authority)
    connection = http.client.HTTPSConnection("127.0.0.1", superlink.port, context=trust)
    connection.request("POST", path, body=b"", headers={"content-type": "application/protobuf"})
    assert connection.getresponse().status == 404
    connection.close()


@leans("flower_transport/control.py", "server/deployment.py", "flower_transport/fleet_session.py")
def test_a_site_is_registered_then_online_then_offline(superlink: SuperLink) -> None:
    key, pem = new_key()
    control, fleet = superlink.control(), superlink.fleet(key)
    number = control.RegisterNode(RegisterNodeRequest(public_key=pem, name="north")).node_id

    def status() -> str:
        (node,) = [node for node in control.ListNodes(ListNodesRequest()).nodes_info if node.node_id == number]
        assert node.public_key == pem, "a key is told in other bytes than it was registered with"
        return str(node.status)

    assert status() == "registered"
    assert fleet.ActivateNode(ActivateNodeRequest(public_key=pem, heartbeat_interval=30)).node_id == number
    assert status() == "online"
    with pytest.raises(httpx.HTTPStatusError):  # a second session is refused while there is one
        fleet.ActivateNode(ActivateNodeRequest(public_key=pem, heartbeat_interval=30))
    fleet.DeactivateNode(DeactivateNodeRequest(node_id=number))
    assert status() == "offline"
    with pytest.raises(
        httpx.HTTPError
    ):  # by which flower_transport/fleet_session.py knows that there was nothing to end
        fleet.DeactivateNode(DeactivateNodeRequest(node_id=number))


@leans("flower_transport/control.py")
def test_a_refusal_says_why(superlink: SuperLink) -> None:
    _, pem = new_key()
    control = superlink.control()
    control.RegisterNode(RegisterNodeRequest(public_key=pem, name="one"))
    with pytest.raises(httpx.HTTPStatusError) as refused:
        control.RegisterNode(RegisterNodeRequest(public_key=pem, name="two"))
    known = FlowerError.from_json(refused.value.response.text)
    assert known is not None
    assert "already" in known.message
    assert FlowerError.from_json("no error of Flower's") is None


def start_run(control: Any, run_id: str) -> int:
    """A run as flower_transport/control.py starts it; Flower's number of it."""
    bundle, _ = build_fab_from_files(BUNDLE)
    assert isinstance(bundle, bytes)
    request = StartRunRequest(
        fab=fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})),
        override_config=user_config_to_proto({"run-id": run_id}),
    )
    return int(control.StartRun(request).run_id)


@leans("flower_transport/control.py", "server/superexec.py")
def test_a_run_is_known_by_what_it_was_started_with_until_it_is_stopped(superlink: SuperLink) -> None:
    control = superlink.control()
    number = start_run(control, "monday")
    run = control.ListRuns(ListRunsRequest()).run_dict[number]
    assert run.override_config["run-id"].string == "monday"
    assert run.status.status != "finished"
    control.StopRun(StopRunRequest(run_id=number))
    assert control.ListRuns(ListRunsRequest()).run_dict[number].status.status == "finished"


# --- calls that fail


@leans("flower_transport/supernode.py")
def test_a_part_that_is_said_to_be_lost_ends_the_wait_for_the_others(identity: None) -> None:
    from flwr.supercore.inflatable import inflatable_protobuf_utils, inflatable_utils

    asked: list[PullObjectRequest] = []

    def lost(request: PullObjectRequest) -> PullObjectResponse:
        asked.append(request)
        return PullObjectResponse(object_found=False)

    pull = inflatable_protobuf_utils.make_pull_object_fn_protobuf(lost, None, 1)
    with pytest.raises(inflatable_utils.ObjectPullError):
        inflatable_utils.pull_objects(["part"], pull)
    assert [request.object_id for request in asked] == ["part"]


@leans("flower_transport/server_task.py")
def test_a_task_that_is_withdrawn_interrupts_who_works_on_it() -> None:
    interrupts: list[int] = []
    client = SimpleNamespace(SendTaskHeartbeat=lambda _: SendTaskHeartbeatResponse(success=False))
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        assert make_task_heartbeat_fn_http(client)()
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupts == [signal.SIGINT]


@leans("flower_transport/supernode.py")
def test_a_call_tells_of_each_failure_before_it_waits_and_of_its_success_to_whoever_was_put_in_place() -> None:
    told: list[str] = []
    answers: Iterator[Any] = iter([httpx.ConnectError("away"), "there", "there"])

    def call() -> Any:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def telling(what: str, theirs: Callable[[Any], object] = lambda _: None) -> Callable[[Any], None]:
        def tell(state: Any) -> None:
            told.append(what)
            theirs(state)

        return tell

    invoker: Any = make_simple_http_retry_invoker()
    invoker.wait_gen_factory = lambda: iter([0.01])
    invoker.wait_function = telling("waits")
    invoker.on_backoff = telling("failed", invoker.on_backoff)
    invoker.on_success = telling("through", invoker.on_success)
    assert invoker.invoke(call) == "there"
    assert told == ["failed", "waits", "through"]
    assert invoker.invoke(call) == "there"
    assert told[3:] == ["through"], "a call that succeeds at once is not told of"
