"""A task of Slurm's `srun` as one process of a group: torch's variables from Slurm's."""

from __future__ import annotations

import re
from collections.abc import Mapping


def started_tasks(environment: Mapping[str, str]) -> int:
    """The number of tasks of the `srun` that started this process; 1 outside srun.

    Not SLURM_NTASKS: a batch script has it too, and counts with it tasks that nobody has started.
    """
    return int(environment.get("SLURM_STEP_NUM_TASKS", "1"))


def torch_variables(environment: Mapping[str, str], devices: int) -> dict[str, str]:
    """The variables that torch reads in a task that sees `devices` GPUs. MASTER_ADDR and MASTER_PORT may be given."""
    local = int(environment["SLURM_LOCALID"])
    run = int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        # With --gpus-per-task a task sees its own GPU only, and that is number 0.
        "LOCAL_RANK": str(local % devices if devices else local),
        # Not SLURM_LAUNCH_NODE_IPADDR: that is where srun was called, which may be a login node.
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        # Below the ports that systems give out by themselves, and another one for each run on a machine.
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20_000 + run % 10_000),
    }


def first_host(nodes: str) -> str:
    """The first machine of a Slurm list, where task 0 runs: `gpu07` of `gpu[07-09,12],cpu1`."""
    first = re.findall(r"(?:[^,\[]|\[[^]]*\])+", nodes)[0]
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first)
