"""A real federation on this machine: SuperLink, two sites, node keys, TLS. Processes are killed; runs go on."""

import asyncio
import os
import socket
import time
from pathlib import Path

import pytest

from client.deployment import init_site, running_processes, start_site, stop_site
from client.supervisor import lock_of, read_link
from core_training.foundation.errors import InputError
from core_training.runs.run_folder import RunFolder
from flower_transport.bundle import BUNDLE
from flower_transport.control import control
from flower_transport.superlink import OperateFromThisMachine
from security.certificates import AUTHORITY_CERTIFICATE, create_authority, issue_server_certificate
from server import run_progress
from server.deployment import (
    admit_site,
    init_federation,
    is_worked_on,
    run_states,
    site_states,
    start_server,
    stop_server,
    submit_run,
)
from server.federation import Address, Federation, open_federation
from server.run_progress import follow, read_progress
from tests import tiny
from tests.server.processes import kill

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


@pytest.mark.parametrize(
    ("path", "client", "status"),
    [
        ("/v1/fleet/pull-messages", "203.0.113.7", 200),
        ("/v1/control/start-run", "203.0.113.7", 403),
        ("/v1/control/register-node", "203.0.113.7", 403),
        ("/v1/runtime/acquire-task", "203.0.113.7", 403),
        ("/v1/fleet", "203.0.113.7", 403),
        ("/docs", "203.0.113.7", 403),
        ("/v1/control/start-run", "127.0.0.1", 200),
        ("/v1/control/start-run", "198.51.100.1", 200),
    ],
)
def test_only_the_servers_own_machine_operates_it(path, client, status):
    statuses = []

    async def flower(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {"type": "http", "path": path, "client": (client, 40000), "server": ("198.51.100.1", 9092)}
    asyncio.run(OperateFromThisMachine(flower)(scope, None, send))
    assert statuses == [status]


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
def test_a_run_goes_on_after_the_servers_processes_are_killed(deployed, undisturbed):
    federation, folder = deployed
    run_id = submit_run(federation, folder / "recipe.yaml", [])
    wait_for_round(federation, run_id, 2)

    kill(federation.run_lock(run_id))
    kill(federation.superlink_lock)
    superlink, resumed = start_server(federation)

    assert superlink is not None
    assert resumed == [run_id]
    assert follow(federation.runs / run_id, lambda event: None)["state_digest"] == undisturbed["state_digest"]


@pytest.mark.slow
def test_a_run_whose_process_alone_is_killed_is_said_to_and_goes_on_with_the_next_start(
    deployed, undisturbed, monkeypatch
):
    federation, folder = deployed
    run_id = submit_run(federation, folder / "recipe.yaml", [])
    wait_for_round(federation, run_id, 1)

    kill(federation.run_lock(run_id))
    monkeypatch.setattr(run_progress, "_REPLACED_WITHIN", 1.0)
    assert follow(federation.runs / run_id, lambda event: None, lambda: is_worked_on(federation, run_id)) == {}
    (note,) = [run.note for run in run_states(federation) if run.run_id == run_id]
    assert "nobody works on it: `fedloom server start`" in note
    superlink, resumed = start_server(federation)

    assert superlink is None
    assert resumed == [run_id]
    assert follow(federation.runs / run_id, lambda event: None)["state_digest"] == undisturbed["state_digest"]


@pytest.mark.slow
def test_a_run_goes_on_after_each_of_a_sites_processes_is_killed(deployed, undisturbed):
    federation, folder = deployed
    run_id = submit_run(federation, folder / "recipe.yaml", [])

    for number, process in enumerate(("worker", "supernode", "messenger")):
        wait_for_round(federation, run_id, number)
        kill(lock_of(folder / "north", process))

    assert follow(federation.runs / run_id, lambda event: None)["state_digest"] == undisturbed["state_digest"]


EVIL = {
    "evil.py": b"""
import pathlib, time
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
server, client = ServerApp(), ClientApp()
@server.main()
def main(grid, context):
    asked = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in grid.get_node_ids()]
    replies = grid.send_and_receive(asked, timeout=60)
    kinds = [reply.content["envelope"]["kind"] for reply in replies]
    pathlib.Path(context.run_config["run-id"]).write_text(" ".join(kinds))
@client.query()
def query(message, context):
    pathlib.Path(context.run_config["run-id"]).write_text("executed at a site")
""",
    "pyproject.toml": BUNDLE["pyproject.toml"]
    .replace(b"server.app:app", b"evil:server")
    .replace(b"client.app:app", b"evil:client"),
}


@pytest.mark.slow
def test_code_in_a_bundle_is_not_executed_at_a_site(deployed):
    federation, folder = deployed
    with control(str(federation.address.from_here), federation.keys / AUTHORITY_CERTIFICATE) as superlink:
        superlink.start(str(folder / "evil.txt"), EVIL)

    deadline = time.monotonic() + 60
    while not (folder / "evil.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert (folder / "evil.txt").read_text() == "refused refused"


@pytest.mark.slow
def test_a_site_that_was_not_admitted_cannot_join(deployed):
    federation, folder = deployed
    stranger = new_site(folder / "stranger", federation, folder, folder)

    with pytest.raises(InputError, match=r"the server at .* does not know this site's key"):
        start_site(stranger)
    assert set(running_processes(stranger).values()) == {None}


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
def test_a_model_that_a_site_does_not_have_is_told_by_name(deployed):
    federation, folder = deployed
    run_id = submit_run(
        federation, folder / "recipe.yaml", ["model.name_or_path=unheard-of", "topology.round_deadline=8"]
    )

    assert follow(federation.runs / run_id, lambda event: None) == {}
    reasons = [event["reason"] for event in RunFolder(federation.runs / run_id).lines("quarantined")]
    assert any("site 'north' has no model 'unheard-of', it has 'tiny'" in reason for reason in reasons)


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
    wait_for("connecting")
    start_server(federation)
    wait_for("connected")
    assert read_link(folder / "north") == before
