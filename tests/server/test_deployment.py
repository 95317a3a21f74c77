"""A real federation on this machine: SuperLink, two sites, node keys, TLS. Processes are killed; runs go on."""

import os
import signal
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import user_config_to_proto
from flwr.proto.control_pb2 import ListRunsRequest, RegisterNodeRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from client.deployment import init_site, running_processes, start_site, stop_site
from client.site_status import site_status
from client.supervisor import read_link
from core_training.foundation import background
from core_training.foundation.errors import InputError, RunError
from core_training.foundation.health import Health
from core_training.foundation.kept_processes import lock_of, log_of
from core_training.runs.run_folder import RunFolder
from flower_transport.bundle import BUNDLE, bundle_hash
from flower_transport.control import control
from security.certificates import AUTHORITY_CERTIFICATE, create_authority, issue_server_certificate
from server.deployment import (
    admit_site,
    init_federation,
    is_worked_on,
    rewind_run,
    run_states,
    site_states,
    start_server,
    stop_server,
    submit_run,
)
from server.deployment import running_processes as running_server
from server.federation import Address, Federation, open_federation
from server.operating import operator_of
from server.run_progress import follow, read_progress
from server.server_status import server_status
from tests import tiny
from tests.server.processes import kill
from tests.server.tcp_proxy import tcp_proxy

ROOT = Path(__file__).parents[2]
RECIPE = """
model: {name_or_path: tiny}
stage: pretrain
tuning: {mode: lora, lora: {r: 2}}
data: {train: notes}
training: {learning_rate: 1e-2, max_length: 32, per_device_train_batch_size: 4}
topology: {kind: federated, rounds: 3, local_steps: 2, minimum_sites: 2, round_deadline: 120}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def new_federation(folder: Path) -> Federation:
    return init_federation(folder, Address(port=free_port()), [])


def new_site(folder: Path, federation: Federation, data: Path, model: Path, authority: Path | None = None) -> Path:
    init_site(
        folder,
        name=folder.name,
        server=str(federation.address),
        data={"notes": [str(data)]},
        models={"tiny": str(model)},
        authority=authority or federation.keys / "ca.crt",
    )
    return folder


def wait_for(there: Callable[[], object], within: float = 60) -> None:
    deadline = time.monotonic() + within
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def outcome(federation: Federation, run_id: str) -> dict[str, Any]:
    """The summary of a run that somebody works on to its end."""
    return follow(federation.runs / run_id, lambda event: None, lambda: is_worked_on(federation, run_id))


def wait_for_round(federation: Federation, run_id: str, number: int, within: float = 120) -> None:
    deadline = time.monotonic() + within
    while read_progress(federation.runs / run_id).round < number:
        assert time.monotonic() < deadline, list(RunFolder(federation.runs / run_id).lines())
        time.sleep(0.05)


# --- what needs no processes


@pytest.fixture
def federation(tmp_path):
    return new_federation(tmp_path / "federation")


def test_a_second_federation_in_the_folder_is_refused_and_the_first_keeps_its_keys(federation):
    authority = (federation.keys / "ca.crt").read_bytes()

    with pytest.raises(InputError, match="there is a federation already"):
        init_federation(federation.folder, Address(), [])
    assert (federation.keys / "ca.crt").read_bytes() == authority


def test_a_sites_private_key_is_the_owners_alone_and_no_server_file_holds_it(federation, tmp_path):
    site = new_site(tmp_path / "a", federation, tmp_path, tmp_path)
    admit_site(federation, "a", site / "keys" / "node.pub")

    assert (site / "keys" / "node.key").stat().st_mode & 0o777 == 0o600
    assert (site / "keys").stat().st_mode & 0o777 == 0o700
    secret = (site / "keys" / "node.key").read_bytes().splitlines()[1]
    assert not any(secret in path.read_bytes() for path in federation.folder.rglob("*") if path.is_file())


def test_a_name_and_a_key_are_admitted_once(federation, tmp_path):
    for name in ("a", "b"):
        new_site(tmp_path / name, federation, tmp_path, tmp_path)
    admit_site(federation, "a", tmp_path / "a/keys/node.pub")

    with pytest.raises(InputError, match="a site named 'a'"):
        admit_site(federation, "a", tmp_path / "b/keys/node.pub")
    with pytest.raises(InputError, match="this key is admitted already, as site 'a'"):
        admit_site(federation, "b", tmp_path / "a/keys/node.pub")
    assert [site.name for site in open_federation(federation.folder).sites()] == ["a"]


@pytest.mark.parametrize("content", [b"ssh-ed25519 AAAA", b"-----BEGIN OPENSSH PRIVATE KEY-----", b"\xff", b""])
def test_what_is_no_public_key_is_not_admitted(federation, tmp_path, content):
    (tmp_path / "key").write_bytes(content)

    with pytest.raises(InputError, match=r"node\.pub"):
        admit_site(federation, "a", tmp_path / "key")


def test_a_port_in_use_is_named(federation):
    with socket.socket() as other:
        other.bind((federation.address.host, federation.address.port))
        other.listen()
        with pytest.raises(InputError, match=f"{federation.address} cannot be used: Address already in use"):
            start_server(federation)


def test_a_missing_foreign_or_mismatched_certificate_does_not_start_a_server(federation, tmp_path):
    certificate, key = federation.keys / "server.crt", federation.keys / "server.key"
    create_authority(tmp_path / "other")
    foreign = issue_server_certificate(tmp_path / "other", ["127.0.0.1"])
    own = certificate.read_bytes()

    certificate.write_bytes(foreign.certificate.read_bytes())
    with pytest.raises(InputError, match="foreign"):
        start_server(federation)
    certificate.unlink()
    with pytest.raises(InputError, match=r"server\.crt: the certificate cannot be read"):
        start_server(federation)
    certificate.write_bytes(own)
    key.write_bytes(foreign.key.read_bytes())
    with pytest.raises(InputError, match=r"does not belong to server\.crt"):
        start_server(federation)


def test_an_expired_certificate_does_not_start_a_server(federation):
    for name in ("server.crt", "server.key"):
        (federation.keys / name).unlink()
    issue_server_certificate(federation.keys, ["127.0.0.1"], days=0)

    with pytest.raises(InputError, match="expired"):
        start_server(federation)


def test_a_run_needs_a_server_and_a_federated_recipe(federation, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)

    with pytest.raises(InputError, match="the server is not running"):
        submit_run(federation, recipe, [])
    with pytest.raises(InputError, match=r"topology\.kind: a server runs 'federated' recipes, not 'gossip'"):
        submit_run(federation, recipe, ["topology.kind=gossip"])
    assert federation.run_ids() == []


@pytest.mark.slow
def test_a_superlink_that_does_not_start_is_said_to_and_leaves_nothing_behind(federation, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    federation.flower_home.mkdir()
    (federation.flower_home / "nodes.json").write_bytes(b"this is no list" * 100)
    with pytest.raises(RunError, match=r"did not start; .*superlink\.log says why"):
        start_server(federation)
    for lock in (federation.server_lock, federation.superlink_lock, federation.superexec_lock):
        assert background.owner(lock) is None


# --- with real processes


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """A running server with two connected sites, `north` and `south`."""
    folder = tmp_path_factory.mktemp("deployed")
    path, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), str(ROOT)
    model = tiny.make_model(folder / "model")
    federation = new_federation(folder / "federation")
    (folder / "recipe.yaml").write_text(RECIPE)
    sites = []
    try:
        start_server(federation)
        for seed, name in enumerate(("north", "south")):
            data = tiny.write_jsonl(folder / f"{name}.jsonl", tiny.texts(seed, 60))
            sites.append(new_site(folder / name, federation, data, model))
            admit_site(federation, name, folder / name / "keys" / "node.pub")
            assert start_site(folder / name)[1].state == "connected"
        yield federation, folder
    finally:
        for site in sites:
            stop_site(site)
        stop_server(federation)
        os.environ.pop("PYTHONPATH")
        if path is not None:
            os.environ["PYTHONPATH"] = path
    assert all(process is None for site in sites for process in running_processes(site).values())


@pytest.fixture(scope="module")
def undisturbed(deployed):
    """The summary of a run in which nothing went wrong."""
    federation, folder = deployed
    return follow(federation.runs / submit_run(federation, folder / "recipe.yaml", []), lambda event: None)


@pytest.mark.slow
def test_an_undisturbed_run_completes_over_both_sites(deployed, undisturbed):
    assert undisturbed["status"] == "completed"
    assert undisturbed["rounds"] == 3
    assert {name: site["rounds"] for name, site in undisturbed["sites"].items()} == {"north": 3, "south": 3}
    assert undisturbed["eval_loss"] < undisturbed["eval_loss_initial"]
    assert site_states(deployed[0]) == {"north": "online", "south": "online"}


@pytest.mark.slow
def test_later_rounds_start_training_within_a_second(deployed, undisturbed):
    federation, _ = deployed
    rounds = RunFolder(federation.runs / federation.run_ids()[0]).lines("round")

    waited = [site["resident_seconds"] for event in rounds for site in event["sites"].values() if event["round"] > 1]
    assert len(waited) == 4
    assert max(waited) < 1


@pytest.mark.slow
def test_a_run_that_is_taken_back_a_round_goes_on_by_itself_and_ends_as_it_did(deployed, undisturbed):
    federation, _ = deployed
    run_id = federation.run_ids()[0]

    assert rewind_run(federation, run_id, 2)

    assert follow(federation.runs / run_id, lambda event: None)["state_digest"] == undisturbed["state_digest"]


@pytest.mark.slow
def test_a_run_goes_on_by_itself_after_each_of_the_servers_processes_is_killed(deployed, undisturbed):
    federation, folder = deployed
    run_id = submit_run(federation, folder / "recipe.yaml", [])

    for number, lock in enumerate((federation.superexec_lock, federation.run_lock(run_id), federation.superlink_lock)):
        wait_for_round(federation, run_id, number)
        wait_for(lambda lock=lock: background.owner(lock))
        kill(lock)

    assert outcome(federation, run_id)["state_digest"] == undisturbed["state_digest"]
    wait_for(lambda: background.owner(federation.superexec_lock))


@pytest.mark.slow
def test_a_run_goes_on_with_the_next_start_after_all_of_the_servers_processes_are_killed(deployed, undisturbed):
    federation, folder = deployed
    run_id = submit_run(federation, folder / "recipe.yaml", [])
    wait_for_round(federation, run_id, 2)

    for lock in (federation.server_lock, federation.superexec_lock, federation.superlink_lock):
        kill(lock)
    kill(federation.run_lock(run_id))
    (note,) = [run.note for run in run_states(federation) if run.run_id == run_id]
    assert "nobody works on it: `fedloom server start`" in note
    supervisor, resumed = start_server(federation)

    assert supervisor is not None
    assert resumed == [run_id]
    assert outcome(federation, run_id)["state_digest"] == undisturbed["state_digest"]


@pytest.mark.slow
def test_a_run_goes_on_after_each_of_a_sites_processes_is_killed(deployed, undisturbed):
    federation, folder = deployed
    run_id = submit_run(federation, folder / "recipe.yaml", [])

    for number, process in enumerate(("worker", "supernode")):
        wait_for_round(federation, run_id, number)
        kill(lock_of(folder / "north", process))

    assert follow(federation.runs / run_id, lambda event: None)["state_digest"] == undisturbed["state_digest"]


@pytest.mark.slow
def test_asynchronous_rounds_go_on_after_the_process_that_holds_them_is_killed(deployed):
    federation, folder = deployed
    asynchronous = ["topology.buffer=1", "topology.minimum_sites=1", "topology.rounds=6"]
    run_id = submit_run(federation, folder / "recipe.yaml", asynchronous)

    wait_for_round(federation, run_id, 3)
    kill(federation.run_lock(run_id))

    summary = outcome(federation, run_id)
    assert (summary["status"], summary["rounds_done"]) == ("completed", 6)
    parts = [part for line in RunFolder(federation.runs / run_id).lines("round") for part in line["sites"].items()]
    assert {site for site, _ in parts} == {"north", "south"}
    assert max(part["stale"] for _, part in parts) >= 1


EVIL = {
    "evil.py": b"""
import pathlib
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
server, client = ServerApp(), ClientApp()
@server.main()
def main(grid, context):
    pathlib.Path(context.run_config["run-id"]).write_text("executed at the server")
""",
    "pyproject.toml": BUNDLE["pyproject.toml"]
    .replace(b"server.app:app", b"evil:server")
    .replace(b"client.app:app", b"evil:client"),
}


def evil_run(trace: Path) -> StartRunRequest:
    """A call to start a run that would leave a trace where it is executed."""
    bundle, _ = build_fab_from_files(EVIL)
    return StartRunRequest(
        fab=Fab(hash_str=bundle_hash(bundle), content=bundle),
        override_config=user_config_to_proto({"run-id": str(trace)}),
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", ["straight", "through a proxy"])
def test_another_account_of_the_servers_machine_operates_nothing(deployed, tmp_path, way):
    """It has the public certificate, Flower's own clients and a port; the credential it cannot read."""
    federation, _ = deployed
    target = (federation.address.host, federation.address.port)
    calls = [
        (ControlHttpClient, "StartRun", evil_run(tmp_path / "trace")),
        (ControlHttpClient, "ListRuns", ListRunsRequest()),
        (ControlHttpClient, "RegisterNode", RegisterNodeRequest(public_key=b"key", name="mine")),
        (RuntimeHttpClient, "AcquireTask", AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])),
        (RuntimeHttpClient, "PullTaskInput", PullTaskInputRequest()),
    ]
    with tcp_proxy(target) if way == "through a proxy" else nullcontext(str(federation.address)) as address:
        for kind, call, request in calls:
            with kind.from_server_address(
                server_address=address,
                insecure=False,
                root_certificates=(federation.keys / "ca.crt").read_bytes(),
                interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
            ) as client:
                with pytest.raises(httpx.HTTPStatusError) as refused:
                    getattr(client, call)(request)
                assert refused.value.response.status_code == 403, call
    with control(operator_of(federation)) as superlink:
        assert str(tmp_path / "trace") not in superlink.active()
    assert not (tmp_path / "trace").exists()


@pytest.mark.slow
def test_the_operator_starts_no_bundle_but_fedlooms_own(deployed, tmp_path):
    federation, _ = deployed
    client = operator_of(federation).client(ControlHttpClient, "flwr CLI")
    with client, pytest.raises(httpx.HTTPStatusError, match="403"):
        client.StartRun(evil_run(tmp_path / "trace"))
    with control(operator_of(federation)) as superlink:
        assert str(tmp_path / "trace") not in superlink.active()


@pytest.mark.slow
def test_another_account_of_a_sites_machine_can_take_no_processes_place(deployed):
    """No port that it could bind first; the worker's socket lies in a folder that it cannot enter."""
    _, folder = deployed
    for process in map(psutil.Process, running_processes(folder / "north").values()):
        listening = [one.laddr for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN]
        assert listening == [], process.cmdline()
    worker = folder / "north/worker.sock"
    assert worker.stat().st_mode & 0o777 == 0o600
    assert worker.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_a_site_that_was_not_admitted_cannot_join(deployed):
    federation, folder = deployed
    stranger = new_site(folder / "stranger", federation, folder, folder)

    with pytest.raises(InputError, match=r"the server at .* does not know this site's key"):
        start_site(stranger)
    assert set(running_processes(stranger).values()) == {None}


@pytest.mark.slow
def test_strangers_with_large_bodies_and_silent_ones_take_little_of_a_server(deployed):
    federation, _ = deployed
    superlink = psutil.Process(background.owner(federation.superlink_lock))
    before, (soft, hard) = superlink.memory_info().rss, superlink.rlimit(psutil.RLIMIT_NOFILE)
    assert soft == hard
    trust = ssl.create_default_context(cafile=federation.keys / AUTHORITY_CERTIFICATE)
    with ExitStack() as stack:
        for _ in range(500):
            stack.enter_context(socket.create_connection(("127.0.0.1", federation.address.port)))
        for _ in range(4):
            stranger = HTTPSConnection("127.0.0.1", federation.address.port, context=trust, timeout=10)
            stack.callback(stranger.close)
            with suppress(OSError):  # it is cut off
                stranger.request("POST", "/v1/fleet/push-object", bytes(100_000_000))
        for _ in range(100):
            connection = socket.create_connection(("127.0.0.1", federation.address.port))
            with suppress(OSError), trust.wrap_socket(connection, server_hostname="127.0.0.1") as stranger:
                stranger.sendall(b"\x1b[2J\r\n\r\n")
                stranger.recv(100)
        assert superlink.memory_info().rss - before < 100_000_000
        assert superlink.num_fds() < 200
    log = log_of(federation.folder, "superlink").read_text()
    assert log.count("Invalid HTTP request") <= 30
    assert "\x1b[2J" not in log  # Flower has colours of its own
    assert set(site_states(federation).values()) == {"online"}


@pytest.mark.slow
def test_a_site_does_not_talk_to_a_server_that_its_authority_does_not_vouch_for(deployed):
    federation, folder = deployed
    authority = create_authority(folder / "foreign")
    site = new_site(folder / "misled", federation, folder, folder, authority.certificate)

    with pytest.raises(InputError, match=r"shows a certificate that .* does not vouch for"):
        start_site(site)
    assert set(running_processes(site).values()) == {None}


@pytest.mark.slow
def test_a_site_starts_once(deployed):
    _, folder = deployed

    with pytest.raises(InputError, match="the site 'north' is running already"):
        start_site(folder / "north")


@pytest.mark.slow
def test_another_run_starts_from_a_runs_result_at_the_sites_that_name_their_copy_of_it(deployed, undisturbed):
    """As docs/deploy.md says of a run that should have had more rounds."""
    federation, folder = deployed
    digest = undisturbed["state_digest"]  # whichever run came to it: one of them was taken back, and ended again
    summaries = {run: RunFolder(federation.runs / run).summary() or {} for run in federation.run_ids()}
    first = next(run for run, summary in summaries.items() if summary.get("state_digest") == digest)
    for name in ("north", "south"):
        assert (folder / name / "runs" / first / "adapter").is_dir()
        stop_site(folder / name)
        with (folder / name / "site.yaml").open("a") as file:
            file.write(f"\nruns: {{together: runs/{first}}}\n")
        assert start_site(folder / name)[1].state == "connected"
    more = submit_run(federation, folder / "recipe.yaml", ["model.adapters=[together]", "topology.rounds=1"])
    summary = outcome(federation, more)
    assert summary["status"] == "completed"
    assert summary["rounds"] == 1
    assert summary["eval_loss_initial"] == pytest.approx(undisturbed["eval_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_model_that_a_site_does_not_have_is_told_by_name(deployed):
    federation, folder = deployed
    run_id = submit_run(
        federation, folder / "recipe.yaml", ["model.name_or_path=unheard-of", "topology.round_deadline=8"]
    )

    assert follow(federation.runs / run_id, lambda event: None) == {}
    reasons = [event["reason"] for event in RunFolder(federation.runs / run_id).lines("quarantined")]
    assert any("site 'north' has no model 'unheard-of', it has 'tiny'" in reason for reason in reasons)


@pytest.mark.slow
def test_a_run_that_no_admitted_site_can_serve_ends_with_their_reasons_long_before_its_deadline(deployed):
    federation, folder = deployed
    run_id = submit_run(federation, folder / "recipe.yaml", ["data.train=nothing", "topology.round_deadline=3600"])
    assert follow(federation.runs / run_id, lambda event: None) == {}
    (state,) = [run for run in server_status(federation).runs if run.run_id == run_id]
    assert state.state == "failed"
    for site in ("north", "south"):
        assert f"{site}: data.train: site '{site}' has no data set 'nothing'" in state.note


@pytest.mark.slow
def test_a_site_whose_supervisor_was_killed_is_unattended_until_it_is_started_again(deployed):
    north = deployed[1] / "north"
    assert site_status(north).health == Health.WELL
    kill(lock_of(north, "site"))
    while running_processes(north)["site"] is not None:
        time.sleep(0.05)
    status = site_status(north)
    assert (status.link, status.health) == ("unattended", Health.NEEDS_A_PERSON)
    assert f"`fedloom client start --folder {north}` takes over" in " ".join(status.attention)
    assert start_site(north)[1].state == "connected"
    status = site_status(north)
    assert (status.link, status.health, status.attention) == ("connected", Health.WELL, [])
    assert abs(status.server.clock_ahead) < 3
    assert status.certificates.keys() == {"ca.crt", "server.crt"}


def of_its_processes(federation):
    """What the status says of the server itself, and not of other tests' runs."""
    status = server_status(federation)
    return [said for said in status.attention if not said.startswith(tuple(run.run_id for run in status.runs))]


@pytest.mark.slow
def test_a_server_whose_supervisor_was_killed_is_unattended_until_it_is_started_again(deployed):
    federation, _ = deployed
    kill(federation.server_lock)
    while running_server(federation)["server"] is not None:
        time.sleep(0.05)
    status = server_status(federation)
    assert (status.running, status.health) == (True, Health.NEEDS_A_PERSON)
    assert f"`fedloom server start --folder {federation.folder}` takes over" in status.attention[0]
    assert "unattended" in status.attention[0]
    start_server(federation)
    assert of_its_processes(federation) == []


@pytest.mark.slow
def test_a_server_whose_superlink_is_started_again_is_running(deployed):
    federation, folder = deployed
    supervisor, superlink = background.owner(federation.server_lock), background.owner(federation.superlink_lock)
    os.kill(supervisor, signal.SIGSTOP)  # or it would have started another before anybody looks
    try:
        kill(federation.superlink_lock)
        while background.owner(federation.superlink_lock) is not None:
            time.sleep(0.05)
        status = server_status(federation)
    finally:
        os.kill(supervisor, signal.SIGCONT)
    assert (status.running, status.health) == (True, Health.NEEDS_A_PERSON)
    assert "the superlink does not run, and is started again" in status.attention[0]
    while background.owner(federation.superlink_lock) in (None, superlink):
        time.sleep(0.05)
    start_server(federation)
    while any(read_link(folder / site).state != "connected" for site in ("north", "south")):
        time.sleep(0.1)
    assert of_its_processes(federation) == []


@pytest.mark.slow
def test_a_site_notes_that_the_server_is_away_and_that_it_is_back(deployed):
    federation, folder = deployed

    def wait_for(state: str) -> None:
        deadline = time.monotonic() + 60
        while read_link(folder / "north").state != state:
            assert time.monotonic() < deadline, (folder / "north/logs/supernode.log").read_text()[-2000:]
            time.sleep(0.2)

    before = read_link(folder / "north")
    assert before.state == "connected"
    stop_server(federation)
    assert server_status(federation).health == Health.NOT_RUNNING
    wait_for("connecting")
    status = site_status(folder / "north")
    assert (status.link, status.health) == ("connecting", Health.NEEDS_A_PERSON)
    assert status.attention == ["the server cannot be reached: Connection refused"]
    start_server(federation)
    wait_for("connected")
    assert read_link(folder / "north") == before
