"""Opening an engine the way a recipe asks: in this process, or in a DeepSpeed group started with torchrun's launcher.

In a group every process runs the same command: rank 0 speaks (it goes on with the caller's code), the others follow.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import core_training.offline  # noqa: F401
from core_training import background
from core_training.errors import InputError
from core_training.recipe import DeepSpeed, Recipe
from core_training.trainable import Trainable


def must_launch(settings: DeepSpeed) -> bool:
    """Whether the work needs a group and this process is not in one yet."""
    return settings.processes > 1 and "LOCAL_RANK" not in os.environ


def run_as_group(processes: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module arguments` as a group on this machine; returns rank 0's exit code, or a failure's."""
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        raise InputError(
            "deepspeed.processes: a group needs DeepSpeed, which is not installed: pip install 'fedloom[deepspeed]'"
        ) from None
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # DeepSpeed compiles an extension at its first use; the `ninja` it needs is installed beside this Python.
    os.environ["PATH"] = background.search_path()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        failures = error.failures
        return abs(int(failures.get(0, error.get_first_failure()[1]).exitcode))
    except SignalException:  # the launcher has passed the signal on and waited: rank 0 saved and said so
        return 130
    return 0


@contextmanager
def opened_engine(recipe: Recipe) -> Iterator[Trainable]:
    """The recipe's engine, closed when the block ends. Raises InputError for a model or data that do not fit.

    In a group, only rank 0 gets this far: the others carry out what it does until it closes, and exit.
    """
    if "LOCAL_RANK" in os.environ and recipe.deepspeed.processes > 1:
        from core_training.group import lead_or_follow

        engine: Trainable = lead_or_follow(recipe)
    else:
        from core_training.engine import open_engine

        engine = open_engine(recipe)
    try:
        yield engine
    finally:
        engine.close()
