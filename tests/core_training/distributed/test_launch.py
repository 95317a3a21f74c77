"""How a process finds its place in a group that another launcher started, and who reaches one that is started here."""

from __future__ import annotations

import socket

import pytest

from core_training.distributed import slurm
from core_training.distributed.launch import must_launch, speaks
from core_training.foundation.errors import InputError
from core_training.recipe.sections.deepspeed import DeepSpeed

VARIABLES = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS"]
TASK = {
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}


@pytest.fixture
def environment(monkeypatch):
    """Set variables, and have those gone afterwards that the code sets."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def set_all(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("gpu[3,5]", "gpu3"),
        ("rack[1-2]n[01-03]-ib,head", "rack1n01-ib"),
    ],
)
def test_the_first_machine_of_a_slurm_list(nodes, first):
    assert slurm.first_host(nodes) == first


def test_a_task_of_srun_takes_its_place_from_slurms_variables(environment):
    environment(TASK)
    assert not must_launch(DeepSpeed(processes=4))
    assert not speaks()
    assert slurm.torch_variables(TASK, devices=0) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "24711",
    }
    assert slurm.torch_variables(TASK, devices=1)["LOCAL_RANK"] == "0"
    assert slurm.torch_variables({**TASK, "MASTER_ADDR": "10.1.0.7"}, devices=4)["MASTER_ADDR"] == "10.1.0.7"


def test_a_batch_script_without_srun_starts_its_own_group(environment):
    environment({**TASK, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"})
    assert must_launch(DeepSpeed(processes=4))
    assert speaks()


def test_tasks_of_srun_that_each_train_alone_are_left_alone(environment):
    environment(TASK)
    assert not must_launch(DeepSpeed())
    assert speaks()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (TASK, r"deepspeed.processes is 2, but the launcher started 4 \(SLURM_STEP_NUM_TASKS\)"),
        (
            {"LOCAL_RANK": "0", "WORLD_SIZE": "8"},
            r"deepspeed.processes is 2, but the launcher started 8 \(WORLD_SIZE\)",
        ),
    ],
)
def test_a_launcher_that_started_another_number_of_processes_is_named(environment, variables, message):
    environment(variables)
    with pytest.raises(InputError, match=message):
        must_launch(DeepSpeed(processes=2))


def test_a_process_that_torchrun_started_beside_others_does_not_train_alone(environment):
    environment({"LOCAL_RANK": "1", "WORLD_SIZE": "2"})
    with pytest.raises(InputError, match=r"deepspeed\.processes is 1"):
        must_launch(DeepSpeed())


def test_processes_of_one_machine_meet_where_no_other_account_reaches_them(tmp_path):
    """In a folder, and not at the port that they are told: nobody listens there."""
    from core_training.distributed.rendezvous import PrivateRendezvous

    meeting = PrivateRendezvous("run", tmp_path).next_rendezvous()
    meeting.store.set("key", "value")
    assert b"value" in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", meeting.bootstrap_store_info.master_port))
