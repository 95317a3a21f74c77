"""Each kind of failure within a training step, in each topology: a line that says why, and nothing lost."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client.deployment import init_site, start_site, stop_site
from core_training.foundation import background
from core_training.foundation.errors import RunError
from core_training.foundation.kept_processes import lock_of
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder, Summary
from server.deployment import admit_site, init_federation, start_server, stop_server, submit_run
from server.federation import Address, Federation
from server.run_progress import follow
from simulations import simulate
from tests import tiny
from tests.broken_steps import BREAKING, GRPO, SAID, TOLD, write_judge

pytestmark = pytest.mark.slow
MakeRecipe = Callable[..., Recipe]
ROOT = Path(__file__).parents[1]
KINDS = list(BREAKING)
IN_PROCESSES = ("memory", "optimizer", "loss")
"""Those that are tried where each takes processes of its own; in one process all of them are."""
SFT = {"prompt": "question", "completion": "answer"}


@pytest.fixture
def recipe(make_recipe: MakeRecipe, site_files: list[Path]) -> MakeRecipe:
    """A small run whose answers are judged by the function in the folder; keyword arguments replace sections."""

    def make(folder: Path, **sections: Any) -> Recipe:
        rollout = {**GRPO["rollout"], "reward_function": f"{folder / 'judge.py'}:judge"}
        files = [str(path) for path in site_files]
        return make_recipe(**{**GRPO, "rollout": rollout, "simulation": {"sites": files}, **sections})

    return make


# In one process, with the real command


def train(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedloom.cli", "train", str(folder / "recipe.yaml"), "--quiet", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=250)


def digest_in(folder: Path) -> str:
    return str((RunFolder(folder / "run").summary() or {})["state_digest"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of the runs without a failure, once they are known."""
    return {}


@pytest.mark.parametrize("kind", IN_PROCESSES)
def test_a_command_says_why_in_one_line_saves_and_goes_on_as_if_nothing_had_been(
    recipe: MakeRecipe, tmp_path: Path, whole: dict[str, str], kind: str
) -> None:
    write_judge(tmp_path, kind, at=3)
    training = {"max_steps": 4, "save_steps": 2 if kind == "optimizer" else 100}
    (tmp_path / "recipe.yaml").write_text(recipe(tmp_path, training=training, output=str(tmp_path / "run")).to_yaml())
    failed = train(tmp_path)
    assert failed.returncode == 1, failed.stderr
    (line,) = failed.stderr.strip().splitlines()
    saved = rf" \(step 2 is saved in {tmp_path}/run; --resume goes on from it\)"
    assert re.fullmatch("error: " + SAID[kind].format(step=3) + saved, line), line
    assert not (tmp_path / "armed").exists()
    assert [event["reason"] in line for event in RunFolder(tmp_path / "run").lines("failed")] == [True]
    resumed = train(tmp_path, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    if "digest" not in whole:
        again = ["--out", str(tmp_path / "again"), f"output={tmp_path / 'again'}"]
        assert train(tmp_path, *again).returncode == 0
        whole["digest"] = str((RunFolder(tmp_path / "again").summary() or {})["state_digest"])
    assert digest_in(tmp_path) == whole["digest"]


def test_memory_that_runs_out_while_a_model_is_loaded_is_said(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A limit on the process, as batch systems set one."""
    (tmp_path / "recipe.yaml").write_text(make_recipe(output=str(tmp_path / "run")).to_yaml())
    program = (
        "import resource, sys; import core_training.foundation.environment, torch, transformers, peft, accelerate\n"
        "from pathlib import Path; from core_training.models import loading; from fedloom import cli\n"
        "inner = loading.tune\n"
        "def tune(*arguments):\n"
        "    pages = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (pages + (64 << 20), resource.RLIM_INFINITY))\n"
        "    torch.empty(1 << 30)\n"
        "import core_training.models.base_model as base_model; base_model.tune = tune\n"
        f"sys.argv = ['fedloom', 'train', {str(tmp_path / 'recipe.yaml')!r}, '--quiet']; cli.main()"
    )
    failed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=250)
    assert failed.returncode == 1, failed.stderr
    assert re.fullmatch(r"error: out of memory in loading the model .*asked for 4\.00 GiB.*", failed.stderr.strip())


def test_an_evaluation_that_fails_loses_no_step(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from core_training.engine.central import train as train_centrally
    from core_training.engine.engine import Engine, open_engine
    from core_training.stages.language import LanguageStage

    asked = recipe(tmp_path, stage="sft", rollout={}, grpo={}, data={"columns": SFT}, training={"max_steps": 6})
    asked = asked.model_copy(update={"topology": asked.topology.model_copy(update={"local_steps": 2})})
    inner = LanguageStage.loss

    def loss(self: LanguageStage, model: Any, batch: Any) -> Any:
        if not model.training and engine.step == 4:
            raise MemoryError
        return inner(self, model, batch)

    run, engine = RunFolder(tmp_path / "run"), open_engine(asked)
    monkeypatch.setattr(LanguageStage, "loss", loss)
    run.prepare(asked, resume=False)
    said = r"out of memory in the evaluation after step 4; lower .* \(step 4 is saved in .*; --resume goes on from it\)"
    with pytest.raises(RunError, match=said):
        train_centrally(asked, engine, run)
    monkeypatch.undo()
    again: Engine = open_engine(asked)
    assert train_centrally(asked, again, run, resume=True).status == "completed"


def test_a_failure_of_one_process_ends_its_group_with_the_reason(recipe: MakeRecipe, tmp_path: Path) -> None:
    """The other process waits in a sum over both; it hears that nobody comes, and what was saved stays."""
    pytest.importorskip("deepspeed")
    write_judge(tmp_path, "shape", at=3, only="os.environ['RANK'] == '1'")
    sections = {"training": {"max_steps": 4, "save_steps": 1}, "deepspeed": {"processes": 2, "stage": 1}}
    (tmp_path / "recipe.yaml").write_text(recipe(tmp_path, **sections, output=str(tmp_path / "run")).to_yaml())
    failed = train(tmp_path)
    assert failed.returncode != 0
    assert re.search(r"^process 1 on .*: the forward pass of step 3 failed: RuntimeError: mat1", failed.stderr, re.M)
    assert "Traceback" not in failed.stderr
    assert max((tmp_path / "run" / "checkpoints").glob("step-*")).name == "step-00000002"
    resumed = train(tmp_path, "--resume")
    assert resumed.returncode == 0, resumed.stderr


# Many sites in one process


def simulated(recipe: Recipe, folder: Path) -> Summary:
    return simulate(recipe, RunFolder(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_a_simulated_site_is_asked_again_and_the_round_comes_to_what_it_would_have(
    recipe: MakeRecipe, tmp_path: Path, whole: dict[str, str], kind: str
) -> None:
    write_judge(tmp_path, kind, at=5)  # the second of three sites, in the second round
    topology = {"kind": "federated", "rounds": 3, "local_steps": 1, "minimum_sites": 3}
    failed = simulated(recipe(tmp_path, topology=topology), tmp_path / "failed")
    (event,) = RunFolder(tmp_path / "failed").lines("quarantined")
    assert (event["site"], event["round"]) == ("site1", 2)
    assert re.fullmatch(SAID[kind].format(step=2), event["reason"]), event["reason"]
    if "simulated" not in whole:
        whole["simulated"] = simulated(recipe(tmp_path, topology=topology), tmp_path / "whole").state_digest
    assert (failed.state_digest, failed.rounds) == (whole["simulated"], 3)


@pytest.mark.parametrize("kind", ["shape", "memory"])
def test_a_simulated_round_is_not_lost_with_one_site(recipe: MakeRecipe, tmp_path: Path, kind: str) -> None:
    write_judge(tmp_path, kind, at=5)
    topology = {"kind": "federated", "rounds": 3, "local_steps": 1, "minimum_sites": 2}
    summary = simulated(recipe(tmp_path, topology=topology), tmp_path / "run")
    assert {name: site.rounds for name, site in summary.sites.items()} == {"site0": 3, "site1": 2, "site2": 3}


@pytest.mark.parametrize("kind", KINDS)
def test_simulated_nodes_go_on_without_the_one_whose_site_fails(recipe: MakeRecipe, tmp_path: Path, kind: str) -> None:
    write_judge(tmp_path, kind, at=5)
    topology = {"kind": "gossip", "rounds": 3, "local_steps": 1, "minimum_sites": 2}
    run = RunFolder(tmp_path / "run")
    rounds: list[int] = []
    summary = simulate(recipe(tmp_path, topology=topology), run, lambda number, _: rounds.append(number))
    (event,) = run.lines("site_failed")
    assert re.search(rf"site '{event['site']}' could not train round 2: " + SAID[kind].format(step=2), event["reason"])
    assert set(summary.sites) == {"site0", "site1", "site2"} - {event["site"]}
    assert rounds == [1, 2, 3]


def test_a_simulation_with_too_few_nodes_left_fails_with_the_reason(recipe: MakeRecipe, tmp_path: Path) -> None:
    write_judge(tmp_path, "shape", at=5)
    topology = {"kind": "gossip", "rounds": 3, "local_steps": 1, "minimum_sites": 3}
    with pytest.raises(RunError, match="could not train round 2: the forward pass of step 2 failed"):
        simulated(recipe(tmp_path, topology=topology), tmp_path / "run")


# A server and its sites, as processes


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Federation, Path]]:
    """A running server with two connected sites, `north` and `south`."""
    folder = tmp_path_factory.mktemp("deployed")
    path, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), str(ROOT)
    model = tiny.make_model(folder / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    federation = init_federation(folder / "federation", Address(port=port), [])
    sites = [folder / name for name in ("north", "south")]
    try:
        start_server(federation)
        for seed, site in enumerate(sites):
            data = tiny.write_jsonl(folder / f"{site.name}.jsonl", tiny.questions(seed, 30))
            init_site(
                site,
                name=site.name,
                server=str(federation.address),
                data={"notes": [str(data)]},
                models={"tiny": str(model)},
                authority=federation.keys / "ca.crt",
            )
            with (site / "site.yaml").open("a") as config:
                config.write("reward_functions: {judge: judge.py:judge}\n")
            write_judge(site, "shape", at=10**9)
            admit_site(federation, site.name, site / "keys" / "node.pub")
            assert start_site(site)[1].state == "connected"
        yield federation, folder
    finally:
        for site in sites:
            stop_site(site)
        stop_server(federation)
        os.environ.pop("PYTHONPATH")
        if path is not None:
            os.environ["PYTHONPATH"] = path


@pytest.mark.parametrize("kind", IN_PROCESSES)
def test_a_sites_worker_lives_on_and_the_others_round_is_not_lost(
    recipe: MakeRecipe, deployed: tuple[Federation, Path], tmp_path: Path, kind: str
) -> None:
    federation, folder = deployed
    write_judge(folder / "south", kind, at=2)
    asked = recipe(tmp_path, topology={"kind": "federated", "rounds": 3, "local_steps": 1, "minimum_sites": 1})
    document = asked.model_copy(
        update={
            "model": asked.model.model_copy(update={"name_or_path": "tiny"}),
            "data": asked.data.model_copy(update={"train": "notes"}),
            "rollout": asked.rollout.model_copy(update={"reward_function": "judge"}),
        }
    )
    (tmp_path / "recipe.yaml").write_text(document.to_yaml())
    worker = background.owner(lock_of(folder / "south", "worker"))
    run_id = submit_run(federation, tmp_path / "recipe.yaml", [])
    summary = follow(federation.runs / run_id, lambda event: None)
    assert summary.get("status") == "completed", list(RunFolder(federation.runs / run_id).lines())[-3:]
    assert {name: site["rounds"] for name, site in summary["sites"].items()} == {"north": 3, "south": 2}
    (event,) = RunFolder(federation.runs / run_id).lines("quarantined")
    assert (event["site"], event["round"]) == ("south", 2)
    assert re.fullmatch(TOLD[kind].format(step=2), event["reason"]), event["reason"]
    assert background.owner(lock_of(folder / "south", "worker")) == worker
    log = (folder / "south" / "logs" / "worker.log").read_text()
    assert re.search(SAID[kind].format(step=2), log)
