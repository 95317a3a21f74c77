"""Flower keeps to what we lean on besides its public interface: module paths, log lines, order, who may ask what.

A real SuperLink, in this process, and a real SuperNode with its own; no model and no process of ours.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import http.client
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import core_training.foundation.environment as environment  # isort: skip - before Flower is imported
import httpx
import psutil
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.app.error import Error
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import fab_to_proto, run_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
)
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, RegisterNodeFleetRequest
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, SendTaskHeartbeatResponse
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.exit import ExitCode
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan, _parse_superlink_lifespan_config
from flwr.superlink.grid import HttpGrid
from flwr.superlink.main import create_app
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from flower_transport import messenger
from flower_transport.bundle import BUNDLE
from flower_transport.credential import ShowCredential, is_shown
from flower_transport.gate import OPEN_TO_OPERATOR, OPEN_TO_SITES
from flower_transport.site_proof import proven_site
from security.certificates import create_authority, issue_server_certificate
from security.private_sockets import listen
from tests.contracts.leaning import calls_out, leans, look_up, names

NAMES = {
    "flower_transport/superlink.py": [
        "flwr.supercore.http_logging:get_uvicorn_log_config",
        "flwr.supercore.logger:console_handler.level",
        "flwr.superlink.cli.flower_superlink:SuperLinkLifespan",
        "flwr.superlink.cli.flower_superlink:_parse_superlink_lifespan_config",
        "flwr.superlink.main:create_app",
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
    "flower_transport/messenger.py": [
        "flwr.app.error:Error",
        "flwr.common.constant:ErrorCode.CLIENT_APP_RAISED_EXCEPTION",
        "flwr.common.constant:SubStatus.COMPLETED",
        "flwr.common.constant:SubStatus.FAILED",
        "flwr.common.serde:context_from_proto",
        "flwr.common.serde:message_from_proto",
        "flwr.proto.message_pb2:ConfirmMessageReceivedRequest",
        "flwr.proto.message_pb2:ObjectTree",
        "flwr.proto.message_pb2:PullObjectRequest",
        "flwr.proto.message_pb2:PullObjectResponse",
        "flwr.proto.node_pb2:Node",
        "flwr.proto.runtime_pb2:AcquireTaskRequest",
        "flwr.proto.runtime_pb2:PullAppMessagesRequest",
        "flwr.proto.runtime_pb2:PullTaskInputRequest",
        "flwr.supercore:log",
        "flwr.supercore.constant:TaskType.CLIENT_APP",
        "flwr.supercore.heartbeat:HeartbeatSender",
        "flwr.supercore.heartbeat:make_task_heartbeat_fn_http",
        "flwr.supercore.inflatable.inflatable_protobuf_utils:make_pull_object_fn_protobuf",
        "flwr.supercore.inflatable.inflatable_utils:pull_objects",
        "flwr.supercore.interceptors:RuntimeTokenHttpInterceptor",
        "flwr.supercore.interceptors:SuperExecAuthHttpInterceptor",
        "flwr.supercore.protobuf.client:ProtobufClientInterceptor",
        "flwr.supercore.retry:make_simple_http_retry_invoker",
        "flwr.supercore.runtime:RuntimeHttpClient",
        "flwr.supercore.task_identity:TaskIdentity",
        "flwr.supernode.runtime.run_clientapp:push_message",
        "flwr.supernode.runtime.run_clientapp:push_task_output",
    ],
    "flower_transport/supernode.py": [
        "flwr.supercore.exit:ExitCode.SUPERNODE_CONNECTION_ERROR",
        "flwr.supernode.cli:flower_supernode",
        "flwr.supernode.cli.flower_supernode:uvicorn.Server.run",
        "flwr.supernode.fleet_http_connection:flwr_exit",
        "flwr.supernode.fleet_http_connection:make_simple_http_retry_invoker",
        "flwr.supernode.start_client_internal:_init_connection",
        "flwr.supernode.start_client_internal:_pull_and_store_message",
        "flwr.supernode.start_client_internal:time.sleep",
    ],
    "flower_transport/fleet_session.py": [
        "flwr.proto.fleet_pb2:DeactivateNodeRequest",
        "flwr.supernode.fleet_http_client:FleetHttpClient.from_server_address",
        "flwr.supernode.node_auth_http_interceptor:NodeAuthHttpInterceptor",
    ],
    "flower_transport/arrivals.py": [
        "flwr.proto.message_pb2:ConfirmMessageReceivedRequest",
        "flwr.proto.message_pb2:ObjectTree",
        "flwr.proto.runtime_pb2:PullAppMessagesRequest",
        "flwr.supercore.inflatable.inflatable_protobuf_utils:make_pull_object_fn_protobuf",
        "flwr.supercore.inflatable.inflatable_utils:ObjectPullError",
        "flwr.supercore.inflatable.inflatable_utils:pull_objects",
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
    ],
    "flower_transport/in_process.py": [
        "flwr.supercore.inflatable.inflatable_object:get_all_nested_objects",
        "flwr.supercore.inflatable.inflatable_utils:inflate_object_from_contents",
        "flwr.supercore.task_identity:TaskIdentity",
    ],
}

SUPERNODE = """
import importlib, socket, sys, time
from contextlib import contextmanager
from types import SimpleNamespace
import core_training.foundation.environment
import uvicorn
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.cli import flower_supernode

def say(*words):
    print(*words, flush=True)

def sleep(seconds):
    say("PAUSE", seconds)
    time.sleep(0.02)

connect, pull = start_client_internal._init_connection, start_client_internal._pull_and_store_message
make, leave = fleet_http_connection.make_simple_http_retry_invoker, fleet_http_connection.flwr_exit

@contextmanager
def connection(*given, **named):
    with connect(*given, **named) as connected:
        say("CONNECTED", connected[0])
        yield connected

def pulled(*given, **named):
    run = pull(*given, **named)
    say("PULLED", run, "state" in named)
    return run

def invoker():
    made = make()
    through = made.on_success
    def on_success(state):
        say("THROUGH")
        through(state)
    made.on_success = on_success
    return made

def leaving(code, message=None, **named):
    say("LEAVES", code, repr(message))
    leave(code, message, **named)

class OnListener(uvicorn.Server):
    def run(self, sockets=None):
        super().run([listener])

listener = socket.socket(fileno=int(sys.argv.pop(1)))
command = importlib.import_module("flwr.supernode.cli.flower_supernode")
command.uvicorn = SimpleNamespace(**{**vars(uvicorn), "Server": OnListener})
start_client_internal.time = SimpleNamespace(**{**vars(time), "sleep": sleep})
start_client_internal._init_connection = connection
start_client_internal._pull_and_store_message = pulled
fleet_http_connection.make_simple_http_retry_invoker = invoker
fleet_http_connection.flwr_exit = leaving
sys.argv[0] = "flower-supernode"
flower_supernode()
"""
"""A SuperNode with its places taken as flower_transport/supernode.py takes them; it says what passes through each."""


# --- names and places


@pytest.mark.parametrize(("file", "name"), names(NAMES), ids=str)
def test_a_name_that_is_not_public_is_where_it_was(file: str, name: str) -> None:
    look_up(file, name)


@leans("flower_transport/supernode.py")
def test_the_supernodes_loop_is_a_module_that_has_the_clock_as_a_name_of_its_own() -> None:
    loop = look_up("flower_transport/supernode.py", "flwr.supernode.start_client_internal:")
    assert isinstance(loop, ModuleType)
    assert loop.time is time


@leans("fedloom/machine.py")
def test_flowers_commands_are_installed_under_their_names() -> None:
    commands = {command.name for command in entry_points(group="console_scripts")}
    assert {"flower-superlink", "flower-supernode", "flower-superexec"} <= commands


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


@leans("flower_transport/messenger.py", "flower_transport/records.py", "flower_transport/in_process.py")
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
        *("--isolation", "process", "--database", str(folder / "state.db")),
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", options)
        config = _parse_superlink_lifespan_config()
    app = create_app(config, SuperLinkLifespan)
    app.add_middleware(Gate)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=config.host,
            port=0,
            ssl_keyfile=config.ssl_keyfile,
            ssl_certfile=config.ssl_certfile,
            log_level="warning",
            proxy_headers=False,
        )
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
    assert config.database == str(superlink.folder / "state.db")
    assert config.ssl_certfile == str(superlink.folder / "server.crt")
    assert config.ssl_keyfile == str(superlink.folder / "server.key")
    assert config.isolation == "process", "a SuperLink starts ServerApps by itself, from bundles"
    assert superlink.app.state.superlink_lifespan.superexec_process is None
    assert (superlink.folder / "state.db").exists()


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


# --- the SuperNode, and an order on its way


@dataclass(frozen=True)
class SuperNode:
    """A running SuperNode that the SuperLink has taken in."""

    node_id: int
    process: int
    socket: Path
    secret: bytes
    log: Path

    def client(self, *interceptors: Any) -> Any:
        """A client as flower_transport/messenger.py makes it, which gives up at once."""
        client = RuntimeHttpClient(
            "http://supernode",
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), *interceptors],
            verify=False,
        )
        over_tcp: httpx.Client = client._client
        over_tcp.close()
        client._client = httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket)), timeout=over_tcp.timeout)
        return client

    def acquire(self) -> Any:
        """The token of a task, as flower_transport/messenger.py asks for one; empty where there is none."""
        signing = SuperExecAuthHttpInterceptor(
            master_secret=self.secret, protected_methods=["/flwr.proto.Runtime/AcquireTask"]
        )
        with self.client(signing) as client:
            return client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])).token


def supernode_process(superlink: SuperLink, folder: Path, key: ec.EllipticCurvePrivateKey) -> Any:
    """A SuperNode with the options of client/supervisor.py, on a socket that is bound already."""
    (folder / "node.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    (folder / "secret").write_bytes(b"s" * 32)
    with listen(folder / "socket") as listener, (folder / "log").open("wb") as log:
        command = [
            *(sys.executable, "-c", SUPERNODE, str(listener.fileno()), "--superlink", superlink.address),
            *("--root-certificates", str(superlink.authority)),
            *("--auth-supernode-private-key", str(folder / "node.key")),
            *("--isolation", "process", "--superexec-auth-secret-file", str(folder / "secret")),
        ]
        root = Path(__file__).parents[2]
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=root, pass_fds=[listener.fileno()])


@pytest.fixture(scope="module")
def processes(superlink: SuperLink, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SuperNode, Path]]:
    """A SuperNode whose key was admitted, and the log of one whose key was not."""
    known, unknown = tmp_path_factory.mktemp("known"), tmp_path_factory.mktemp("unknown")
    key, pem = new_key()
    superlink.control().RegisterNode(RegisterNodeRequest(public_key=pem, name="south"))
    started = [supernode_process(superlink, known, key), supernode_process(superlink, unknown, new_key()[0])]
    try:
        number = wait_for(
            lambda: re.search(r"CONNECTED (\d+)", (known / "log").read_text()),
            "a connection that flower_transport/supernode.py sees being made",
        )
        started[1].wait(timeout=60)
        node = SuperNode(int(number[1]), started[0].pid, known / "socket", b"s" * 32, known / "log")
        yield node, unknown / "log"
    finally:
        for process in started:
            process.kill()
            process.wait()


@leans("flower_transport/supernode.py")
def test_a_connection_that_is_made_begins_with_the_nodes_number(
    superlink: SuperLink, processes: tuple[SuperNode, Path]
) -> None:
    nodes = superlink.control().ListNodes(ListNodesRequest()).nodes_info
    assert processes[0].node_id in {node.node_id for node in nodes if node.status == "online"}


@leans("flower_transport/supernode.py", "client/deployment.py")
def test_a_refusal_leaves_with_its_own_code_and_why_in_the_second_line(processes: tuple[SuperNode, Path]) -> None:
    said = processes[1].read_text()
    leaving = re.search(r"LEAVES (\d+) (.*)", said)
    assert leaving is not None, said[-2000:]
    assert int(leaving[1]) == ExitCode.SUPERNODE_CONNECTION_ERROR
    message = ast.literal_eval(leaving[2])
    assert "Failed to activate SuperNode" in message.partition("\n")[2].partition("\n")[0]
    assert "CONNECTED" not in said


@leans("flower_transport/supernode.py")
def test_a_supernodes_loop_goes_through_the_places_that_were_taken(processes: tuple[SuperNode, Path]) -> None:
    """Without an order it asks the clock that it was given for three seconds."""
    log = processes[0].log
    wanted = ("PAUSE 3\n", "PULLED None True\n", "THROUGH\n")
    wait_for(lambda: all(words in log.read_text() for words in wanted), f"{wanted} of a SuperNode")


@leans("flower_transport/supernode.py")
def test_a_supernode_that_was_given_a_socket_opens_no_port(processes: tuple[SuperNode, Path]) -> None:
    processes[0].acquire()  # who answers serves already
    opened = psutil.Process(processes[0].process).net_connections("inet")
    assert [one.laddr for one in opened if one.status == psutil.CONN_LISTEN] == []


@leans("flower_transport/messenger.py")
def test_tasks_are_handed_to_who_knows_the_secret_alone(processes: tuple[SuperNode, Path]) -> None:
    supernode = processes[0]
    assert supernode.acquire() == "", "there is no order, and a task all the same"
    for interceptors in ([], [SuperExecAuthHttpInterceptor(master_secret=b"other", protected_methods=["/x"])]):
        with supernode.client(*interceptors) as client, pytest.raises(httpx.HTTPStatusError) as refused:
            client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        assert refused.value.response.status_code in (401, 403)


class Counting:
    """A task's client behind what flower_transport/messenger.py puts before it: each part that is fetched is seen."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.parts = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def PullObject(self, request: Any) -> Any:
        self.parts += 1
        return self._client.PullObject(request)


@leans(
    "flower_transport/grid.py",
    "flower_transport/messenger.py",
    "flower_transport/supernode.py",
    "flower_transport/apps.py",
)
def test_orders_go_out_in_order_and_answers_name_the_orders(
    superlink: SuperLink, processes: tuple[SuperNode, Path], identity: None
) -> None:
    """From a ServerApp's grid to a site and back, as the round loop and the messenger do it."""
    supernode, control = processes[0], superlink.control()
    run = start_run(control, "tuesday")
    token = superlink.runtime().AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])).token
    grid = superlink._kept(HttpGrid(superlink.address, False, superlink.authority.read_bytes(), token=token))
    grid._retry_invoker.should_giveup = lambda _: True  # else a refusal would interrupt the tests
    task = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
    assert task.run.run_id == run
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task.task_id, run, task.context.node_id
    grid.set_run(run_from_proto(task.run))
    assert supernode.node_id in set(grid.get_node_ids())

    orders = [order(RecordDict({"order": ConfigRecord({"number": n})}), supernode.node_id) for n in range(3)]
    ids = list(grid.push_messages(orders))
    assert ids == [one.object_id for one in orders], "push_messages returns ids in another order than the messages'"
    assert list(grid.pull_messages(ids)) == []

    answered = {}
    for number in range(1, 4):
        # Who asks for parts before they are in waits for a second and more.
        soon = time.monotonic() + 2
        while supernode.log.read_text().count("Received successfully") < number and time.monotonic() < soon:
            time.sleep(0.02)
        client = supernode.client(RuntimeTokenHttpInterceptor(wait_for(supernode.acquire, "a task")))
        heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
        heartbeat.start()
        counting = Counting(client)
        _, tree, context = messenger._hear(counting)
        message = messenger._take_in(counting, tree, context, max_message_bytes=0)
        assert counting.parts > 0, (
            "parts are fetched past PullObject: flower_transport/messenger.py does not see them stall"
        )
        assert isinstance(message, Message)
        assert isinstance(context, Context)
        assert context.run_config["run-id"] == "tuesday", "what a run was started with does not reach its apps"
        assert context.node_config.get("partition-id", context.node_id) == supernode.node_id
        answered[message.metadata.message_id] = message.content["order"]["number"]
        content = RecordDict({"answer": ConfigRecord({"n": answered[message.metadata.message_id]})})
        push_message(client, Message(content, reply_to=message), context)
        push_task_output(client, context, SubStatus.COMPLETED, "")
        heartbeat.stop()
        client.close()
    assert answered == dict(zip(ids, range(3), strict=True))

    replies: dict[str, Message] = {}

    def all_came() -> bool:
        came = grid.pull_messages([number for number in ids if number not in replies])
        replies.update({reply.metadata.reply_to_message_id: reply for reply in came})
        return len(replies) == 3

    wait_for(all_came, "the answers")
    assert {number: reply.content["answer"]["n"] for number, reply in replies.items()} == answered
    assert {reply.metadata.src_node_id for reply in replies.values()} == {supernode.node_id}
    pauses = set(map(float, re.findall(r"PAUSE ([\d.]+)", supernode.log.read_text())))
    assert any(pause < 3 for pause in pauses), f"a SuperNode that has an order pauses for {pauses} s"
    control.StopRun(StopRunRequest(run_id=run))


@leans("flower_transport/messenger.py")
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


@leans("flower_transport/messenger.py")
def test_a_task_that_is_withdrawn_interrupts_who_works_on_it() -> None:
    interrupts: list[int] = []
    client = SimpleNamespace(SendTaskHeartbeat=lambda _: SendTaskHeartbeatResponse(success=False))
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        assert make_task_heartbeat_fn_http(client)()
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupts == [signal.SIGINT]


# --- a SuperNode's connection and its memory


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


@leans("flower_transport/supernode.py")
@pytest.mark.parametrize("during", ["nothing", "the order itself", "a part of it"])
def test_an_order_whose_run_ends_while_its_parts_are_fetched_is_kept_and_shows_in_the_memory(
    identity: None, during: str
) -> None:
    """From then on a SuperNode's answers would be one order late: it is started anew."""
    from flwr.supercore.inflatable.inflatable_object import get_object_tree
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supercore.run import Run, RunNotRunningException
    from flwr.supernode.nodestate import NodeStateFactory

    stores = ObjectStoreFactory()
    state = NodeStateFactory(objectstore_factory=stores).state()
    state.set_node_id(7)
    state.store_run(Run.create_empty(1))
    message = order()
    message.metadata.__dict__["_message_id"] = message.object_id

    def ended(*_: Any) -> Any:
        raise RunNotRunningException

    received = {"nothing": lambda: None, "the order itself": ended}
    came = look_up("flower_transport/supernode.py", "flwr.supernode.start_client_internal:_pull_and_store_message")(
        state=state,
        object_store=stores.store(),
        node_config={},
        receive=received.get(during, lambda: (message, get_object_tree(message))),
        get_run=ended,
        get_fab=ended,
        pull_object=ended,
        confirm_message_received=ended,
        trusted_entities=None,
    )
    assert came is None
    kept = [one.metadata.message_id for one in state.get_messages_legacy(is_reply=False)]
    assert kept == ([message.object_id] if during == "a part of it" else [])
