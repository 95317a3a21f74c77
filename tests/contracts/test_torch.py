"""PyTorch keeps to what we lean on besides its documentation: its words, its launcher, when it draws, what it skips."""

from __future__ import annotations

import os
import pickle
import re
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import MethodType
from typing import Any

import core_training.foundation.environment  # noqa: F401  # isort: skip - before PyTorch is imported
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils.data import DataLoader

from tests.contracts.leaning import leans, look_up, names

NAMES = {
    "core_training/distributed/launch.py": [
        "torch.distributed.elastic.multiprocessing.api:SignalException",
        "torch.distributed.elastic.multiprocessing.errors:ChildFailedError.get_first_failure",
        "torch.distributed.launcher.api:LaunchConfig",
        "torch.distributed.launcher.api:elastic_launch",
    ],
    "core_training/distributed/rendezvous.py": [
        "torch.distributed:FileStore",
        "torch.distributed:PrefixStore",
        "torch.distributed.elastic.rendezvous:RendezvousHandler.use_agent_store",
        "torch.distributed.elastic.rendezvous:RendezvousInfo",
        "torch.distributed.elastic.rendezvous:RendezvousParameters",
        "torch.distributed.elastic.rendezvous:RendezvousStoreInfo",
        "torch.distributed.elastic.rendezvous:rendezvous_handler_registry.register",
    ],
    "core_training/engine/step_loop.py": [
        "torch.nn.utils:get_total_norm",
        "torch.nn.utils:clip_grads_with_norm_",
    ],
}


@pytest.mark.parametrize(("file", "name"), names(NAMES), ids=str)
def test_a_name_is_where_it_was(file: str, name: str) -> None:
    look_up(file, name)


@leans("core_training/tuning/lora.py")
def test_a_module_holds_its_own_parameters_alone_in_a_mapping() -> None:
    assert set(nn.Linear(1, 1)._parameters) == {"weight", "bias"}
    assert not nn.Sequential(nn.Linear(1, 1))._parameters


@leans("core_training/distributed/launch.py", "core_training/foundation/environment.py")
@pytest.mark.parametrize(
    "module", ["torch.distributed.elastic.agent.server.api", "torch.distributed.launcher.api"], ids=str
)
def test_the_launcher_speaks_under_the_name_that_is_silenced(module: str) -> None:
    assert look_up("core_training/distributed/launch.py", f"{module}:logger").name == module


# --- words that tell failures apart


ASKED = re.compile(r"tried to allocate ([\d.]+ ?[KMGT]?i?B(?:ytes)?)", re.IGNORECASE)


@leans("core_training/engine/failures.py")
def test_memory_that_is_not_there_is_told_with_what_was_asked_for() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory") as failed:
        torch.empty(2**60, dtype=torch.uint8)
    asked = ASKED.search(str(failed.value))
    assert asked is not None
    assert asked[1] == f"{2**60} bytes"
    assert torch.OutOfMemoryError.__name__ == "OutOfMemoryError"
    assert issubclass(torch.OutOfMemoryError, RuntimeError)


@leans("core_training/engine/failures.py")
def test_a_loss_that_depends_on_nothing_is_told_in_these_words() -> None:
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.ones(()).backward()


@leans("core_training/engine/failures.py")
def test_a_process_of_a_group_that_has_ended_is_told_in_one_of_these_words() -> None:
    """Two ends of a group, both in this process."""
    store = dist.HashStore()
    ends: dict[int, Any] = {}

    def join(rank: int) -> None:
        ends[rank] = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=20))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    del ends[1]
    with pytest.raises(RuntimeError, match=r"Connection closed by peer|Connection reset by peer"):
        ends[0].allreduce([torch.ones(1)]).wait()


# --- steps


@leans("core_training/engine/step_loop.py")
@pytest.mark.parametrize("share", [0.5, 0.999, 1.0, 1.001, 4.0])
def test_clipping_multiplies_by_the_share_of_the_norm_and_leaves_what_is_within_it_alone(share: float) -> None:
    parameter = nn.Parameter(torch.zeros(50))
    gradient = torch.randn(50, generator=torch.Generator().manual_seed(0))
    parameter.grad = gradient.clone()
    norm = nn.utils.get_total_norm([parameter.grad])
    most = float(norm) * share
    nn.utils.clip_grads_with_norm_([parameter], most, norm)
    if most < norm + 1e-6:
        assert torch.equal(parameter.grad, gradient * (most / (norm + 1e-6)).float())
    else:
        assert torch.equal(parameter.grad, gradient), "a gradient within the bound is touched"


@leans("core_training/engine/step_loop.py", "core_training/engine/optimizers.py")
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1),
    ],
    ids=["adamw_torch", "sgd"],
)
def test_an_optimizer_whose_memory_is_all_zeros_is_one_that_has_taken_no_step(make: Callable[..., Any]) -> None:
    def step(optimizer: Any, parameter: Any, seed: int) -> None:
        parameter.grad = torch.randn(5, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    used = nn.Parameter(torch.ones(5))
    optimizer = make([used])
    for seed in range(3):
        step(optimizer, used, seed)
    fresh = nn.Parameter(used.detach().clone())
    for state in optimizer.state.values():
        for name, value in state.items():
            state[name] = value.zero_() if torch.is_tensor(value) else 0
    step(optimizer, used, 7)
    step(make([fresh]), fresh, 7)
    assert torch.equal(used, fresh)


@leans("core_training/engine/step_loop.py")
def test_a_schedule_that_is_stepped_alone_stands_where_it_would_with_the_optimizer() -> None:
    rates = []
    for takes_steps in (True, False):
        parameter = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(4):
                if takes_steps:
                    optimizer.step()
                schedule.step()
        rates.append((optimizer.param_groups[0]["lr"], schedule.state_dict()["last_epoch"]))
    assert rates == [(1 / 5, 4)] * 2


@leans("core_training/engine/step_loop.py")
def test_opening_an_epoch_draws_from_the_generator_and_reading_its_batches_does_not() -> None:
    loader = DataLoader(list(range(6)), batch_sampler=[[0, 1], [2, 3], [4, 5]], collate_fn=list)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches = iter(loader)
    opened = torch.get_rng_state()
    assert not torch.equal(before, opened), "no random number is drawn: what is put back after a restart is another"
    assert list(batches) == [[0, 1], [2, 3], [4, 5]]
    assert torch.equal(torch.get_rng_state(), opened), "batches draw random numbers: a resumed run has others"


@leans("core_training/models/precision.py")
def test_a_forward_that_is_set_on_a_module_is_the_one_that_is_called_and_its_data_may_change_type() -> None:
    layer = nn.Linear(2, 2).bfloat16()
    weight = layer.weight
    weight.data = weight.data.float()
    assert layer.weight is weight
    assert weight.dtype == torch.float32
    layer.forward = MethodType(lambda self, x: "ours", layer)
    assert vars(layer)["forward"] is layer.forward
    assert layer(torch.ones(2)) == "ours"


@leans("core_training/engine/step_loop.py")
@pytest.mark.parametrize(
    ("damage", "error"),
    [
        ("cut", RuntimeError),
        ("text", pickle.UnpicklingError),
        ("code", pickle.UnpicklingError),
        ("missing", FileNotFoundError),
    ],
)
def test_a_damaged_file_is_an_error_of_a_known_kind(tmp_path: Path, damage: str, error: type[Exception]) -> None:
    file = tmp_path / "progress.pt"
    torch.save({"step": 3, "memory": print if damage == "code" else torch.arange(100)}, file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:500])
    elif damage == "text":
        file.write_text("no checkpoint")
    elif damage == "missing":
        file.unlink()
    with pytest.raises(error):
        torch.load(file, map_location="cpu", weights_only=True)


# --- the launcher


class Meeting(RendezvousHandler):  # type: ignore[misc]
    """A rendezvous of one launcher with itself, as in core_training/distributed/rendezvous.py."""

    ports: list[int] = []

    def __init__(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.ports.append(self.port)
        self.store = dist.TCPStore(
            "127.0.0.1",
            self.port,
            is_master=True,
            timeout=timedelta(seconds=30),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return "contract"

    def next_rendezvous(self) -> RendezvousInfo:
        meeting_point = RendezvousStoreInfo("127.0.0.1", self.port)
        return RendezvousInfo(dist.PrefixStore("run", self.store), 0, 1, meeting_point)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return "run"

    def shutdown(self) -> bool:
        return True


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Starts a program as a group of one; what the launcher does to this process is undone."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in signals}
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "")
    if "contract" not in rendezvous_handler_registry._registry:
        rendezvous_handler_registry.register("contract", lambda _: Meeting())
    signal.signal(signal.SIGTERM, lambda *_: None)  # should the launcher not take it

    def launch(program: str) -> Any:
        config = LaunchConfig(
            run_id="group",
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=1,
            rdzv_backend="contract",
            shutdown_timeout=20,
            max_restarts=0,
            monitor_interval=0.1,
        )
        return elastic_launch(config, sys.executable)("-c", program)

    yield launch
    for number, handler in before.items():
        signal.signal(number, handler)


@leans("core_training/distributed/rendezvous.py", "core_training/distributed/launch.py")
def test_a_rendezvous_is_asked_for_nothing_more() -> None:
    assert RendezvousHandler.__abstractmethods__ <= set(vars(Meeting))


@leans("core_training/distributed/launch.py", "core_training/distributed/rendezvous.py")
def test_a_process_of_a_group_is_told_its_place_and_the_meeting_point(
    launched: Callable[[str], Any], tmp_path: Path
) -> None:
    wanted = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE")
    file = tmp_path / "told"
    launched(f"import os; open({str(file)!r}, 'w').write(' '.join(os.environ[n] for n in {wanted!r}))")
    assert file.read_text().split() == ["127.0.0.1", str(Meeting.ports[-1]), "0", "0", "1", "True"]


@leans("core_training/distributed/launch.py")
def test_a_failure_tells_the_exit_code_of_each_process(launched: Callable[[str], Any]) -> None:
    with pytest.raises(ChildFailedError) as failed:
        launched("import sys; sys.exit(7)")
    assert failed.value.failures[0].exitcode == 7
    rank, first = failed.value.get_first_failure()
    assert (rank, first.exitcode) == (0, 7)


@leans("core_training/distributed/launch.py")
def test_a_signal_is_passed_on_and_waited_for(launched: Callable[[str], Any], tmp_path: Path) -> None:
    file = tmp_path / "saved"
    program = (
        "import os, signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(0.3)\n"
        f"    open({str(file)!r}, 'w').write('saved')\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"os.kill({os.getpid()}, signal.SIGTERM)\n"
        "time.sleep(20)\n"
    )
    with pytest.raises(SignalException):
        launched(program)
    assert file.read_text() == "saved"
