"""Federated evaluation over real processes, from the command line: masked, with kills, and with sites that refuse."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from client.deployment import start_site, stop_site
from core_training.foundation.errors import InputError
from core_training.foundation.kept_processes import lock_of
from core_training.runs import events
from core_training.runs.run_folder import RunFolder
from evaluation.running import Settings, evaluate
from evaluation.tasks.loading import Wanted, load_task
from fedloom.cli import app
from server.deployment import evaluate_run, stop_server
from server.evaluation_requests import Request, is_pending, results
from server.federation import Federation, open_federation
from tests import tiny
from tests.server.processes import kill
from tests.server.test_deployment import ROOT, wait_for
from tests.server.test_secure_deployment import RECIPE, fedloom

pytestmark = pytest.mark.slow
NAMES = ("north", "south", "west")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A running federation of three sites, and a masked run that they have finished; west has no data set `ward`."""
    folder = tmp_path_factory.mktemp("evaluated")
    tiny.make_model(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), str(ROOT)
    try:
        fedloom(folder, "server", "init", "--port", port)
        for seed, name in enumerate(NAMES):
            tiny.write_jsonl(folder / f"{name}.jsonl", tiny.texts(seed, 60))
            tiny.write_jsonl(folder / f"{name}-ward.jsonl", tiny.texts(10 + seed, 12 + seed))
            keys = ["--name", name, "--server", f"127.0.0.1:{port}", "--ca", "federation/keys/ca.crt"]
            own = ["--data", f"notes={name}.jsonl", "--model", "tiny=model"]
            fedloom(folder, "client", "init", "--folder", name, *keys, *own)
            site = yaml.safe_load((folder / name / "site.yaml").read_text())
            site["secure_aggregation"] = {"minimum_sites": 2}
            site["data"]["all"] = site["data"]["notes"]
            if name != "west":
                site["data"]["ward"] = str(folder / f"{name}-ward.jsonl")
            (folder / name / "site.yaml").write_text(yaml.safe_dump(site))
            fedloom(folder, "server", "admit", name, f"{name}/keys/node.pub")
        fedloom(folder, "server", "roster")
        for name in NAMES:
            fedloom(folder, "client", "pin", "roster.json", "--folder", name)
        fedloom(folder, "server", "start")
        for name in NAMES:
            fedloom(folder, "client", "start", "--folder", name)
        fedloom(folder, "server", "submit", "recipe.yaml", "topology.rounds=1", "--wait", "--quiet")
        yield folder, open_federation(folder / "federation").run_ids()[0]
    finally:
        for name in NAMES:
            stop_site(folder / name)
        stop_server(open_federation(folder / "federation"))
        os.environ.pop("PYTHONPATH")
        if path is not None:
            os.environ["PYTHONPATH"] = path


def whole(folder: Path, run: Path, files: list[str]) -> dict[str, Any]:
    """What one judge of all these files finds, with the result as the server has it."""
    together = folder / "together.jsonl"
    together.write_text("".join((folder / name).read_text() for name in files))
    task = load_task(str(together), Wanted(("loss", "token_accuracy")))
    settings = Settings(max_length=32, overlap=False, base=folder / "model")
    found: dict[str, Any] = evaluate([str(run)], [task], settings, folder / "pooled").results[0].document
    return found


def test_sites_judge_a_run_that_has_ended_and_the_server_sees_their_sum(finished: tuple[Path, str]) -> None:
    folder, run_id = finished
    federation = open_federation(folder / "federation")
    words = ["server", "evaluate", run_id, "--on", "ward", "--metrics", "loss,token_accuracy", "--json"]
    document = json.loads(fedloom(folder, *words).splitlines()[-1])
    result = document["results"][0]
    pooled = whole(folder, federation.runs / run_id, ["north-ward.jsonl", "south-ward.jsonl"])
    assert result["masked"] is True
    assert result["n"] == pooled["n"] == 25
    assert result["sites"] == ["north", "south"]
    assert list(result["missing"]) == ["west"]
    assert "no data set 'ward'" in result["missing"]["west"]
    assert result["metrics"]["loss"]["value"] == pytest.approx(pooled["metrics"]["loss"]["value"], abs=1e-6)
    assert result["metrics"]["token_accuracy"]["value"] == pooled["metrics"]["token_accuracy"]["value"]
    assert results(federation.runs / run_id, Request(data="ward", metrics=["loss", "token_accuracy"])) == document
    wait_for(lambda: not federation.is_wanted(run_id))
    refused = CliRunner().invoke(app, [*words, "--metrics", "regex:x", "--folder", str(federation.folder)])
    assert isinstance(refused.exception, InputError)


def test_a_killed_server_and_a_killed_site_go_on_with_an_evaluation(finished: tuple[Path, str]) -> None:
    folder, run_id = finished
    federation: Federation = open_federation(folder / "federation")
    run = federation.runs / run_id
    stop_site(folder / "west")  # so that there is somebody to wait for
    request = Request(data="all", metrics=["loss", "token_accuracy"])
    evaluate_run(federation, run_id, request)
    north = RunFolder(folder / "north" / "runs" / run_id)
    wait_for(lambda: any(event.data == "all" for event in north.events(events.ResultJudged)), within=120)
    kill(federation.run_lock(run_id))
    kill(lock_of(folder / "south", "worker"))
    start_site(folder / "west")
    wait_for(lambda: not is_pending(run, "all"), within=200)
    found = results(run, request)
    assert found is not None, list(RunFolder(run).events(events.EvaluationFailed))
    result = found["results"][0]
    assert result["sites"] == list(NAMES)
    pooled = whole(folder, run, [f"{name}.jsonl" for name in NAMES])
    assert result["n"] == pooled["n"] == 180
    assert result["metrics"]["loss"]["value"] == pytest.approx(pooled["metrics"]["loss"]["value"], abs=1e-6)
