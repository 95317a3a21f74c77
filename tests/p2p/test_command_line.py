"""`fedloom p2p` from the first command to the result, with the real worker and a real (tiny) model."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from client.worker_client import worker_lock
from core_training.foundation import background
from core_training.runs.run_folder import RunFolder
from p2p.deployment import node_lock, stop_node
from tests.broken_steps import SAID, TOLD, write_judge
from tests.p2p.conftest import free_port

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
RECIPE = """
model: {name_or_path: tiny}
stage: sft
tuning: {mode: lora, lora: {r: 4, lora_alpha: 8}}
data: {train: notes, columns: {prompt: question, completion: answer}}
training: {learning_rate: 1e-2, per_device_train_batch_size: 4, max_length: 64}
topology: {kind: federated, rounds: 2, local_steps: 2}
"""


def fedloom(*words):
    return subprocess.run(
        [sys.executable, "-m", "fedloom.cli", "p2p", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


def answer(*words):
    done = fedloom(*words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model, site_files):
    """Two nodes' folders and the roster, as the commands make them, and the founder's key."""
    folder = tmp_path_factory.mktemp("made")
    entries = []
    for number in (0, 1):
        entry = answer(
            "init", "--folder", folder / f"n{number}", "--name", f"site{number}",
            "--listen", f"127.0.0.1:{free_port()}", "--data", f"notes={site_files[number]}",
            "--model", f"tiny={tiny_model}",
        )  # fmt: skip
        entries.append(entry["entry"])
    roster = answer("roster", *entries, "--out", folder / "roster.json", "--founder-key-folder", folder / "founder")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder, roster["founder"]


@pytest.fixture
def nodes(made, tmp_path):
    """Two new nodes' folders, the roster, the founder's key and a recipe; nodes are stopped at the end."""
    folder = Path(shutil.copytree(made[0], tmp_path / "nodes"))
    yield folder, made[1]
    for number in (0, 1):
        stop_node(folder / f"n{number}")


def test_two_nodes_from_init_to_one_adapter(nodes):
    folder, founder = nodes
    for number in (0, 1):
        words = (
            "--folder",
            folder / f"n{number}",
            "--roster",
            folder / "roster.json",
            "--founder",
            founder,
            "--detach",
        )
        answer("start", *words, folder / "recipe.yaml")
    again = fedloom("start", *words, "--detach", folder / "recipe.yaml")
    assert (again.returncode, "running already" in again.stderr) == (2, True)
    deadline = time.monotonic() + 120
    while any(background.owner(node_lock(folder / f"n{n}")) for n in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    digests = set()
    for number in (0, 1):
        status = answer("status", "--folder", folder / f"n{number}")
        assert (status["state"], status["round"], len(status["losses"])) == ("completed", 2, 2)
        run = folder / f"n{number}" / "runs" / status["run_id"]
        digests.add(json.loads((run / "summary.json").read_text())["state_digest"])
        assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert len(digests) == 1
    assert answer("stop", "--folder", folder / "n0") == {"stopped": False}


def test_wrong_input_is_one_line_and_exit_code_2(nodes):
    folder, founder = nodes
    start = ("start", "--folder", folder / "n0", "--roster", folder / "roster.json")
    for words, reason in [
        ((*start, folder / "recipe.yaml"), "--founder is needed"),
        ((*start, folder / "none.yaml", "--founder", founder), "no such recipe"),
        (
            (*start, folder / "recipe.yaml", "topology.minimum_sites=9", "--founder", founder),
            "the roster has 2 members",
        ),
        ((*start, folder / "recipe.yaml", "--detach", "--founder", founder[:-6] + "AAAAA="), "this node trusts"),
        (("status", "--folder", folder / "nowhere"), "no such file"),
    ]:
        done = fedloom(*words)
        assert (done.returncode, reason in done.stderr) == (2, True), done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_run_goes_on_when_a_nodes_worker_is_killed(nodes):
    folder, founder = nodes
    for number in (0, 1):
        answer(
            "start", "--folder", folder / f"n{number}", "--roster", folder / "roster.json", "--founder", founder,
            "--detach", folder / "recipe.yaml", "topology.rounds=12", "topology.round_deadline=60",
        )  # fmt: skip
    runs = [RunFolder(next((folder / f"n{number}" / "runs").iterdir())) for number in (0, 1)]
    deadline = time.monotonic() + 240
    while len(list(runs[0].lines("epoch"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(background.owner(worker_lock(folder / "n0")), signal.SIGKILL)
    while not all(list(run.lines("run_completed")) for run in runs):
        assert time.monotonic() < deadline, [list(run.lines())[-3:] for run in runs]
        time.sleep(0.2)
    assert len({run.summary()["state_digest"] for run in runs}) == 1
    assert (folder / "n0" / "logs" / "worker.log").read_text().count("is ready") == 2


def test_a_node_whose_site_fails_says_why_and_the_others_round_is_not_lost(nodes):
    """Started again, it goes on with the others; in one process, every kind of failure is tried (test_failures)."""
    folder, founder = nodes
    kind = "memory"
    for number in (0, 1):
        write_judge(folder / f"n{number}", kind, at=2 if number else 10**9)
        with (folder / f"n{number}" / "site.yaml").open("a") as config:
            config.write("reward_functions: {judge: judge.py:judge}\n")
    recipe = RECIPE.replace("sft", "grpo").replace(", completion: answer", "").replace("rounds: 2", "rounds: 8")
    (folder / "recipe.yaml").write_text(
        f"{recipe}rollout: {{max_new_tokens: 8, reward_function: judge}}\ngrpo: {{num_generations: 2}}\n"
        "privacy: {codec: fp32}\n"
    )
    starts = [
        (
            "start", "--folder", folder / f"n{number}", "--roster", folder / "roster.json", "--founder", founder,
            "--quiet", folder / "recipe.yaml", "topology.local_steps=1", "topology.round_deadline=60",
        )
        for number in (0, 1)
    ]  # fmt: skip
    answer(*starts[0], "--detach")
    failed = fedloom(*starts[1])
    assert failed.returncode == 1, failed.stderr
    # A slow machine's node tells before it of connections that took long to prove who they are.
    (line,) = (line for line in failed.stderr.splitlines() if line.startswith("error: "))
    assert re.fullmatch("error: site 'site1' could not train round 2: " + TOLD[kind].format(step=2), line), line
    assert re.search(SAID[kind].format(step=2), (folder / "n1" / "logs" / "worker.log").read_text())
    (own,) = (RunFolder(run) for run in (folder / "n1" / "runs").iterdir())
    assert [event["round"] for event in own.lines("epoch")] == [1]
    again = fedloom(*starts[1])
    assert again.returncode == 0, again.stderr
    runs = [RunFolder(next((folder / f"n{number}" / "runs").iterdir())) for number in (0, 1)]
    deadline = time.monotonic() + 60
    while not all(list(run.lines("run_completed")) for run in runs):
        assert time.monotonic() < deadline, [list(run.lines())[-3:] for run in runs]
        time.sleep(0.2)
    assert len({run.summary()["state_digest"] for run in runs}) == 1
    assert len(list(runs[0].lines("epoch"))) == 8
