"""Opening an engine the way a recipe asks: in this process, or as one of a DeepSpeed group.

A group on one machine is started here; on several, another launcher starts every process (torchrun, DeepSpeed's, srun).
All run the same command: rank 0 speaks (it goes on with the caller's code), the others follow.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from signal import Signals
from typing import NoReturn

from core_training.distributed import slurm
from core_training.foundation import environment
from core_training.foundation.errors import InputError
from core_training.foundation.stopping import stopping_when_ready
from core_training.foundation.trainable import Trainable
from core_training.models.libraries import settle_libraries
from core_training.recipe.schema import Recipe
from core_training.recipe.sections.deepspeed import DeepSpeed

_log = logging.getLogger(__name__)

_SAVED_WITHIN = 600
"""Seconds that the launcher gives its processes to save, once it was asked to stop; torchrun's default is 30."""


def must_launch(settings: DeepSpeed) -> bool:
    """Whether the work needs a group, and no launcher has made this process one of a group yet.

    Raises InputError when a launcher has, but with another number of processes.
    """
    if "LOCAL_RANK" not in os.environ:
        _take_place_from_slurm(settings.processes)
    grouped = "LOCAL_RANK" in os.environ
    if grouped:
        _check_size(settings.processes, "WORLD_SIZE")
    if not settings.used:
        environment.train_alone()
    return settings.used and not grouped


def speaks() -> bool:
    """Whether this process is the one of its group that prints and writes. Known once `must_launch` was asked."""
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


def _take_place_from_slurm(processes: int) -> None:
    """Give torch Slurm's variables, unless the recipe asks for one process: then an srun's tasks are unrelated."""
    if processes == 1 or slurm.started_tasks(os.environ) == 1:
        return
    _check_size(processes, "SLURM_STEP_NUM_TASKS")
    import torch

    os.environ.update(slurm.torch_variables(os.environ, torch.cuda.device_count()))


def _check_size(processes: int, variable: str) -> None:
    started = int(os.environ.get(variable, "1"))
    if started != processes:
        raise InputError(
            f"deepspeed.processes is {processes}, but the launcher started {started} ({variable}); "
            "it counts the processes on all machines, so the two must be equal"
        )


def run_as_group(processes: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module arguments` as a group on this machine; returns rank 0's exit code, or a failure's."""
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        raise InputError(
            "deepspeed.processes: a group needs DeepSpeed, which is not installed: pip install 'fedloom[deepspeed]'"
        ) from None
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from core_training.distributed import rendezvous

    environment.train_alone()  # but for those that are started here
    # That processes end is said by the one that speaks.
    logging.getLogger("torch.distributed.elastic.agent.server.api").disabled = True
    # Nothing of a group on one machine is within reach of another.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""  # they are heard here, where an echo is told from a second one
    with tempfile.TemporaryDirectory(prefix="fedloom-group-", ignore_cleanup_errors=True) as folder:
        os.environ[rendezvous.FOLDER] = folder
        config = LaunchConfig(
            run_id="group",
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            rdzv_backend=rendezvous.BACKEND,
            rdzv_endpoint=folder,
            shutdown_timeout=_SAVED_WITHIN,
            max_restarts=0,
            monitor_interval=0.1,
        )
        return _exit_code(lambda: elastic_launch(config, sys.executable)("-m", module, *arguments))


def _exit_code(launch: Callable[[], object]) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def pass_on(number: Signals) -> NoReturn:
        raise SignalException(f"{number.name} came", sigval=number)

    try:
        with stopping_when_ready(pass_on, _leave_at_once):
            launch()
    except ChildFailedError as error:
        failures = error.failures
        return abs(int(failures.get(0, error.get_first_failure()[1]).exitcode))
    except SignalException as stop:  # the launcher has passed the signal on and waited: rank 0 saved and said so
        return 128 + stop.sigval
    return 0


def _leave_at_once(number: Signals) -> NoReturn:
    """End this process, which its group follows; an exception would be waited with for as long as for a group."""
    _log.warning("stopped at once; --resume goes on from what was saved before")
    os._exit(128 + number)


@contextmanager
def opened_engine(recipe: Recipe) -> Iterator[Trainable]:
    """The recipe's engine, closed when the block ends. Raises InputError for a model or data that do not fit.

    In a group, only rank 0 gets this far: the others carry out what it does until it closes, and exit.
    """
    if "LOCAL_RANK" in os.environ and recipe.deepspeed.used:
        from core_training.distributed.group import lead_or_follow

        engine: Trainable = lead_or_follow(recipe)
    else:
        settle_libraries()
        from core_training.engine.engine import open_engine

        environment.train_alone()
        engine = open_engine(recipe)
    try:
        yield engine
    finally:
        engine.close()
