"""What the environment may say, and what it may not: one recipe has one digest, whoever set what before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from core_training.recipe.schema import Recipe

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
ACCELERATE = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "PARALLELISM_CONFIG_TP_SIZE": "2",
}
ENVIRONMENTS = {
    "accelerate": ACCELERATE,
    **{name: {name: ACCELERATE[name]} for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_DEEPSPEED")},
    "launcher of one": {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "192.0.2.1"},
    "leftovers of launchers": {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "192.0.2.1",
        "MASTER_PORT": "29500",
        "PMI_SIZE": "4",
        "PMI_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_RANK": "3",
        "MV2_COMM_WORLD_SIZE": "4",
        "SLURM_JOB_ID": "7",
    },
    "arithmetic": {
        "XLA_USE_BF16": "1",
        "USE_TORCH_XLA": "1",
        "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
        "NVIDIA_TF32_OVERRIDE": "1",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
        "DS_ACCELERATOR": "cuda",
    },
    "libraries": {
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "USE_HUB_KERNELS": "1",
        "TRANSFORMERS_VERBOSITY": "debug",
        "TOKENIZERS_PARALLELISM": "true",
        "SM_HP_MP_PARAMETERS": "{}",
        "TORCH_SHOW_CPP_STACKTRACES": "1",
        "WANDB_DISABLED": "false",
    },
}


def trained(folder: Path, variables: dict[str, str]) -> tuple[str, str]:
    """The digest that a command in this environment comes to, and what it says."""
    command = [sys.executable, "-m", "fedloom.cli", "train", str(folder / "recipe.yaml"), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=200, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["state_digest"]), done.stderr


@pytest.fixture(scope="module")
def plain() -> dict[str, str]:
    """The digest where nothing is set, once it is known."""
    return {}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_no_variable_changes_a_digest_or_ends_a_run(
    make_recipe: Callable[..., Recipe], tmp_path: Path, plain: dict[str, str], name: str
) -> None:
    recipe = make_recipe(
        tuning={"lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}},
        training={"max_steps": 2, "gradient_accumulation_steps": 2},
        output=str(tmp_path / "run"),
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    if not plain:
        plain["digest"], said = trained(tmp_path, {})
        assert "not heeded" not in said
    variables = ENVIRONMENTS[name]
    digest, said = trained(tmp_path, variables)
    assert digest == plain["digest"]
    if name in ("accelerate", "arithmetic"):
        (line,) = [line for line in said.splitlines() if "not heeded" in line]
        assert all(variable in line for variable in variables)


STARTED = ("client.worker", "client.supervisor", "fedloom.cli", "server.deployment", "core_training.engine.engine")


@pytest.mark.parametrize("module", STARTED)
@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_wait_briefly_in_every_process_unless_the_user_says_otherwise(
    module: str, variables: dict[str, str], expected: str
) -> None:
    """It is read when PyTorch is imported: whatever starts a process, or is one, has set it before."""
    program = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': print('torch', os.environ.get('GOMP_SPINCOUNT'))\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"import {module}, torch\n"
    )
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120, env=clean | variables
    )
    assert done.stdout.splitlines()[0] == f"torch {expected}", done.stderr


@pytest.mark.parametrize(
    ("variables", "stays_offline"),
    [
        ({}, "0"),
        ({"HF_HUB_OFFLINE": "1"}, "1"),
        ({"TRANSFORMERS_OFFLINE": "true"}, "1"),
        ({"HF_HUB_OFFLINE": "0"}, "0"),
    ],
)
def test_who_switches_the_hub_off_is_told_from_fedlooms_own_doing(
    variables: dict[str, str], stays_offline: str
) -> None:
    """Also by a process that it starts, in whose environment the hub is off in any case."""
    show = "import os, core_training.foundation.environment; print(os.environ['FEDLOOM_OFFLINE'])"
    again = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {show!r}], check=True)"
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "FEDLOOM_OFFLINE")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", f"{show}\n{again}"], capture_output=True, text=True, cwd=ROOT, env=clean | variables
    )
    assert done.stdout.split() == [stays_offline] * 2, done.stderr


def test_a_variable_that_opens_another_interface_is_not_heeded() -> None:
    code = "import os; from core_training.foundation.environment import IGNORED as i; print(i, sorted(os.environ))"
    doors = {"FLWR_INTERNAL_GRPC_CONTROL_API": "1", "FLWR_INTERNAL_GRPC_FLEET_API": "1"}
    environment = {**os.environ, **doors, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    ignored, _, left = done.stdout.partition("] [")
    assert all(door in ignored and door not in left for door in doors)
