"""A DeepSpeed group of two processes (gloo, CPU) against one process."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from core_training.engine.engine import open_engine
from core_training.foundation.state import TrainableState
from core_training.foundation.trainable import StepFigures, total
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from tests.core_training.distributed.group_program import figures
from tests.matrix.cells import Workplace
from tests.stand_in_hub import StandInHub

MakeRecipe = Callable[..., Recipe]
pytestmark = pytest.mark.slow

LAUNCH = (
    "import sys, core_training.foundation.environment; from core_training.distributed.launch import run_as_group; "
    "sys.exit(run_as_group(2, 'tests.core_training.distributed.group_program', sys.argv[1:]))"
)

WRITTEN = [
    ("full", 0, "float32"),
    ("full", 1, "float32"),
    ("full", 2, "float32"),
    ("lora", 3, "float32"),
    ("full", 0, "bfloat16"),
    ("full", 2, "bfloat16"),
]

TRAINED = [
    ("pretrain", "freeze", 1, "none"),
    ("sft", "full", 3, "none"),
    ("sft", "lora", 0, "none"),
    ("reward", "lora", 3, "all"),
    ("dpo", "qlora", 3, "none"),
    ("dpo", "full", 2, "optimizer"),
    ("kto", "full", 1, "none"),
    ("orpo", "freeze", 2, "none"),
    ("simpo", "qlora", 1, "optimizer"),
    ("ppo", "full", 3, "none"),
]


JUDGE = """
def score(prompts, completions):
    return [sum(map(ord, prompt + text)) % 7 / 7.0 for prompt, text in zip(prompts, completions)]
"""
PPO = {
    # A penalty that each rollout's answers steer by much.
    "ppo": {"num_ppo_epochs": 2, "kl_coef": 1.0, "kl_target": 1e-6, "kl_horizon": 10},
}

IN_BFLOAT16 = ("dpo", "full", 0, "none", "bfloat16")


def written_recipe(place: Workplace, mode: str, zero: int, dtype: str, processes: int) -> Recipe:
    return place.recipe(
        "sft",
        mode,
        sites=2,
        model={"dtype": dtype},
        data={"eval_fraction": 0.2},
        training={"learning_rate": 0.0, "per_device_train_batch_size": 2},
        deepspeed={"processes": processes, "stage": zero if processes > 1 else 0},
    )


def trained_recipe(
    place: Workplace, stage: str, mode: str, zero: int, offload: str, dtype: str = "float32", *, processes: int
) -> Recipe:
    """Past the end of the first epoch, whose last batch is neither full nor of an even number of rows."""
    judge = place.folder / "judge_of_prompts.py"
    judge.write_text(JUDGE)
    return place.recipe(
        stage,
        mode,
        sites=3,
        dropout=0.0,
        model={"dtype": dtype},
        data={"eval_fraction": 0.2},
        training={
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 8 // processes,
            "max_steps": 4,
            # Layers that are computed again fetch their weights again.
            "gradient_checkpointing": zero == 3 and mode == "lora",
        },
        # Answers without chance: the same whoever samples them.
        **(
            {"rollout": {"reward_function": f"{judge}:score", "top_p": 1e-9, "max_new_tokens": 2}, **PPO}
            if stage == "ppo"
            else {}
        ),
        deepspeed={"processes": 2, "stage": zero, "offload": offload} if processes > 1 else {},
    )


@pytest.fixture(scope="module")
def place(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("group"), tiny_model)


@pytest.fixture(scope="module")
def grouped(place: Workplace) -> Path:
    """A folder with what one group made of all cases: starting it is what takes long."""
    folder = place.folder / "cases"
    folder.mkdir()
    for case in WRITTEN:
        recipe = written_recipe(place, *case, processes=2)
        (folder / f"{name_of(case)}.yaml").write_text(recipe.to_yaml())
        (folder / f"{name_of(case)}.state").write_bytes(noisy_state(place, case).to_bytes())
    for cell in (*TRAINED, IN_BFLOAT16):
        recipe = trained_recipe(place, *cell, processes=2)
        (folder / f"{name_of(cell)}.yaml").write_text(recipe.to_yaml())
    finished = subprocess.run([sys.executable, "-c", LAUNCH, folder], capture_output=True, text=True, timeout=280)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return folder


def name_of(case: tuple[Any, ...]) -> str:
    return "-".join(map(str, case))


def noisy_state(place: Workplace, case: tuple[str, int, str]) -> TrainableState:
    engine = open_engine(written_recipe(place, *case, processes=1))
    start = engine.initial_state
    engine.close()
    scale = 1.0 if case[0] == "lora" else 0.3
    noise = np.random.default_rng(0).normal(0, scale, start.buffer.shape).astype(np.float32)
    return TrainableState(start.manifest, start.buffer + noise)


@pytest.mark.parametrize("case", WRITTEN, ids=name_of)
def test_a_written_state_is_what_the_group_evaluates_trains_from_and_reads_back(
    place: Workplace, grouped: Path, case: tuple[str, int, str]
) -> None:
    """DeepSpeed's master copies silently undo a write to the parameters alone."""
    alone = open_engine(written_recipe(place, *case, processes=1))
    alone.begin_round(noisy_state(place, case))
    expected = total(alone.evaluate()).loss
    result = json.loads((grouped / f"{name_of(case)}.json").read_text())
    tolerance = 1e-5 if case[2] == "float32" else 1e-2
    assert result["engine"] == "DeepSpeedEngine"
    assert abs(result["before"] - expected) > 3 * tolerance
    assert result["read_back"] == 0
    assert result["after_write"] == pytest.approx(expected, abs=tolerance)
    assert result["after_step"] == pytest.approx(expected, abs=tolerance)
    assert result["after_restore"] == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("cell", TRAINED, ids=name_of)
def test_a_group_trains_as_one_process_does(place: Workplace, grouped: Path, cell: tuple[str, str, int, str]) -> None:
    alone = open_engine(trained_recipe(place, *cell, processes=1))
    expected = figures(alone)
    result = json.loads((grouped / f"{name_of(cell)}.json").read_text())
    assert result["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert result["weights"] == expected["weights"]
    assert result["evaluation"]["loss_sum"] == pytest.approx(expected["evaluation"]["loss_sum"], abs=1e-4, rel=1e-5)
    assert result["evaluation"]["examples"] == expected["evaluation"]["examples"]
    assert np.abs(np.subtract(result["state"], expected["state"])).max() < 5e-5
    assert np.abs(np.subtract(expected["state"], alone.initial_state.buffer)).max() > 1e-4


def test_the_reference_of_a_group_in_bfloat16_is_not_rounded(place: Workplace, grouped: Path) -> None:
    """The first loss of DPO is ln 2: policy and reference are one model, and say the same of the same answers."""
    losses = json.loads((grouped / f"{name_of(IN_BFLOAT16)}.json").read_text())["losses"]
    expected = figures(open_engine(trained_recipe(place, *IN_BFLOAT16, processes=1)))["losses"]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses == pytest.approx(expected, abs=1e-2)


def by_itself(command: list[str], port: int) -> list[subprocess.Popen[str]]:
    """The command starts its own group."""
    return [started([sys.executable, "-m", *command])]


def by_torchrun_on_two_machines(command: list[str], port: int) -> list[subprocess.Popen[str]]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    where = ["--master-addr=127.0.0.1", f"--master-port={port}", "-m"]
    return [started([*launcher, f"--node-rank={rank}", *where, *command]) for rank in (0, 1)]


def by_srun(command: list[str], port: int) -> list[subprocess.Popen[str]]:
    task = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_LOCALID": "0",
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost,elsewhere[1-2]",
        "MASTER_PORT": str(port),
    }
    return [started([sys.executable, "-m", *command], {**task, "SLURM_PROCID": str(rank)}) for rank in (0, 1)]


def started(command: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    variables = {**os.environ, **(environment or {})}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)


@pytest.mark.parametrize(
    ("start", "deepspeed", "mode"),
    [
        (by_itself, {"processes": 2, "stage": 2}, "full"),
        (by_itself, {"processes": 1, "stage": 3, "offload": "all"}, "full"),
        (by_torchrun_on_two_machines, {"processes": 2, "stage": 3}, "lora"),
        (by_srun, {"processes": 2, "stage": 1}, "lora"),
    ],
)
def test_a_group_trains_the_same_whoever_starts_it_and_exports_whole(
    make_recipe: MakeRecipe, tmp_path: Path, start: Callable[..., Any], deepspeed: dict[str, Any], mode: str
) -> None:
    settings = {"tuning": {"mode": mode}, "training": {"max_steps": 5, "learning_rate": 1e-3, "logging_steps": 2}}
    engine = open_engine(make_recipe(**settings))
    points: list[StepFigures] = []
    report = engine.train(5, on_figures=points.append)
    expected = total(engine.evaluate()).loss

    recipe = make_recipe(
        **{
            **settings,
            "training": {**settings["training"], "per_device_train_batch_size": 4 // deepspeed["processes"]},
        },
        deepspeed=deepspeed,
        output=str(tmp_path / "run"),
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    processes = start(["fedloom.cli", "train", str(tmp_path / "recipe.yaml"), "--json"], port)
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs[0][1][-3000:]
    said = "".join(stdout for stdout, _ in outputs)
    summary = json.loads(said)  # one process speaks
    assert summary["train_loss_first"] == pytest.approx(report.loss_first, abs=1e-5)
    assert summary["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert summary["tokens_trained"] == report.tokens
    rows = [row for row in RunFolder(tmp_path / "run").curve() if "loss" in row]
    assert [row["step"] for row in rows] == [point.step for point in points] == [2, 4, 5]
    for row, point in zip(rows, points, strict=True):
        assert (row["weight"], row["tokens"]) == (point.weight, point.tokens)
        assert (row["loss"], row["learning_rate"]) == pytest.approx((point.loss, point.learning_rate), abs=1e-5)
        assert row["grad_norm"] == pytest.approx(point.grad_norm, rel=1e-3)
    exported = load_file(next((tmp_path / "run").glob("*/*model.safetensors")))
    shapes = {name.removeprefix("base_model.model."): array.shape for name, array in exported.items()}
    assert shapes == {spec.name: spec.shape for spec in engine.manifest.tensors}


def test_one_process_of_a_group_fetches_the_model_for_all(
    make_recipe: MakeRecipe, hub: StandInHub, tiny_model: Path, tmp_path: Path
) -> None:
    commit = hub.add("org/tiny", tiny_model)
    recipe = make_recipe(
        model={"name_or_path": "org/tiny", "download": True},
        training={"max_steps": 1},
        deepspeed={"processes": 2, "stage": 1},
        output=str(tmp_path / "run"),
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    processes = by_torchrun_on_two_machines(["fedloom.cli", "train", str(tmp_path / "recipe.yaml"), "--json"], port)
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs[0][1][-3000:]
    assert [one.path for one in hub.asked].count("/api/models/org/tiny") == 1
    assert f"org/tiny@{commit}" in (tmp_path / "run" / "recipe.yaml").read_text()


@pytest.mark.parametrize("named", ["optimizer", "scheduler"])
def test_a_users_own_file_may_name_optimizer_and_scheduler(place: Workplace, tmp_path: Path, named: str) -> None:
    """The same optimizer gives the same run; killed after a checkpoint and resumed, the run is the one that was not."""
    parameters = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
    warmup = {"total_num_steps": "auto", "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
    plain = {
        **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"), "auto"),
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    theirs = {**plain, "optimizer": {"type": "AdamW", "params": parameters}}
    if named == "scheduler":
        theirs["scheduler"] = {"type": "WarmupDecayLR", "params": warmup}
    digests = []
    for name, document in (("plain", plain), ("theirs", theirs)) if named == "optimizer" else (("theirs", theirs),):
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
        recipe = place.recipe(
            "sft",
            "lora",
            sites=2,
            training={"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2},
            deepspeed={"processes": 2, "config": str(tmp_path / f"{name}.json")},
        )
        (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
        digests.append(commanded(tmp_path, "--out", str(tmp_path / name)))
    if named == "optimizer":
        assert digests[0] == digests[1]
        return
    newest = max((tmp_path / "theirs" / "checkpoints").glob("step-*"))
    newest.rename(tmp_path / "newest")
    (tmp_path / "theirs" / "summary.json").unlink()
    digests.append(commanded(tmp_path, "--out", str(tmp_path / "theirs"), "--resume"))
    assert len(set(digests)) == 1


def commanded(folder: Path, *words: str) -> str:
    """The digest that `fedloom train` comes to."""
    command = [sys.executable, "-m", "fedloom.cli", "train", str(folder / "recipe.yaml"), "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return str(json.loads(done.stdout)["state_digest"])
