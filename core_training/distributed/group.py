"""A DeepSpeed group as one Trainable: rank 0 announces each call, the other ranks carry out the same call.

What is announced is a small JSON document, and where there is one, a trainable state: no pickle between the ranks.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import deepspeed
import torch
import torch.distributed as dist
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from core_training.distributed import proven_gloo
from core_training.distributed.extension_builds import clear_killed_builds
from core_training.distributed.leaving import leave
from core_training.distributed.rendezvous import meeting_point
from core_training.engine.engine import Engine, open_engine
from core_training.engine.failures import explained
from core_training.foundation import background
from core_training.foundation.errors import DivergedError, FedloomError, InputError, RunError
from core_training.foundation.state import Manifest, TrainableState
from core_training.foundation.stopping import STOPS
from core_training.foundation.trainable import (
    WHOLE,
    DataReport,
    EvalReport,
    OnFigures,
    Trainable,
    TrainedPart,
    TrainReport,
)
from core_training.recipe.reading import parse_recipe
from core_training.recipe.schema import Recipe

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

_calls: dist.ProcessGroup | None = None
"""The group over which rank 0 announces what is to be done; `_join_group` makes it."""


def lead_or_follow(recipe: Recipe) -> GroupEngine:
    """On rank 0 the group's engine for `recipe`; on the other ranks this never returns."""
    join_or_follow()
    return GroupEngine(recipe)


def join_or_follow() -> None:
    """Meet the other processes. Returns on rank 0; the other ranks follow it until it closes its engine, and exit."""
    _join_group()
    if dist.get_rank() > 0:
        follow()


def _join_group() -> None:
    """Meet the other processes (once). This process ends when the one that launched the group has gone."""
    global _calls
    if dist.is_initialized():
        return
    # DeepSpeed compiles an extension at its first use; the `ninja` it needs is installed beside this Python.
    os.environ["PATH"] = background.search_path()
    clear_killed_builds()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    # Before any model is loaded: ZeRO-3 asks for the group's size while it loads.
    backend = "nccl" if torch.cuda.is_available() else proven_gloo.NAME
    deepspeed.init_distributed(
        backend,
        auto_mpi_discovery=False,
        verbose=False,
        init_method=meeting_point(),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    # The next call may be days away; within one, a rank that does not come is noticed by the usual timeout.
    _calls = dist.new_group(backend=proven_gloo.NAME, timeout=timedelta(days=365))


def _end_with(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    os._exit(1)


class GroupEngine:
    """Rank 0's side. See `core_training.foundation.trainable.Trainable`."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        _announce({"call": "open", "recipe": recipe.to_yaml()})
        self._engine = _open_together(recipe)
        self._used = False
        self._out_of_step = False

    @property
    def manifest(self) -> Manifest:
        return self._engine.manifest

    @property
    def data_report(self) -> DataReport:
        return self._engine.data_report

    @property
    def training_sources(self) -> dict[str, int]:
        return self._engine.training_sources

    @cached_property
    def initial_state(self) -> TrainableState:
        return self._engine.initial_state

    @property
    def initial_digest(self) -> str:
        return self._engine.initial_digest

    @property
    def step(self) -> int:
        self._launch()
        return self._engine.step

    @property
    def total_steps(self) -> int:
        self._launch()
        return self._engine.total_steps

    def read_state(self) -> TrainableState:
        return self._call("read_state", self._engine.read_state)

    def write_state(self, state: TrainableState) -> None:
        def write() -> None:
            _broadcast_state(state)
            self._engine.write_state(state)

        self._call("write_state", write)

    def begin_round(
        self,
        state: TrainableState,
        *,
        missed_rounds: bool = False,
        left_out: bool = False,
        part: TrainedPart = WHOLE,
    ) -> None:
        assert part.is_whole, "the engine lets no such recipe begin"

        def begin() -> None:
            _broadcast_state(state)
            self._engine.begin_round(state, missed_rounds=missed_rounds)

        self._call("begin_round", begin, missed_rounds=missed_rounds)

    def alone(self, steps: int, learning_rate: float | None = None, pull: float = 0.0) -> Trainable:
        raise RunError("a DeepSpeed group trains one state")

    def skip(self, steps: int) -> None:
        self._call("skip", lambda: self._engine.skip(steps), steps=steps)

    def train(
        self, steps: int, on_step: Callable[[int, int], None] | None = None, on_figures: OnFigures | None = None
    ) -> TrainReport:
        return self._call("train", lambda: self._engine.train(steps, on_step, on_figures), steps=steps)

    def salvage(self) -> list[TrainReport] | None:
        """Return nothing: rank 0 does not know what the others hold after a failure."""
        return None

    def stop(self) -> None:
        self._engine.stop()

    def evaluate(self) -> dict[str, EvalReport]:
        return self._call("evaluate", self._engine.evaluate)

    def checkpoint(self, folder: Path, notes: Mapping[str, Any] | None = None) -> None:
        folder = folder.absolute()
        self._call("checkpoint", lambda: self._engine.checkpoint(folder, notes), folder=str(folder))

    def restore(self, folder: Path) -> dict[str, Any]:
        self._reopen_if_used()
        self._used = True
        folder = folder.absolute()
        return self._call("restore", lambda: _restore_together(self._engine, folder), folder=str(folder))

    def reset(self) -> None:
        self._reopen_if_used()

    def save_model(self, folder: Path) -> None:
        folder = folder.absolute()
        self._call("save_model", lambda: self._engine.save_model(folder), folder=str(folder))

    def layout(self, base_name: str) -> dict[str, str]:
        return self._engine.layout(base_name)

    def close(self) -> None:
        self._engine.close()
        if not self._out_of_step:
            with suppress(RuntimeError):  # the others have gone, each for a reason that it has given
                _announce({"call": "close"})
                dist.destroy_process_group()

    def _call(self, name: str, do: Callable[[], Result], **order: Any) -> Result:
        """Announce a call and do this process's part. Where that fails, the group is of no use any more.

        The others may wait for this process in vain. A loss that is no number is seen by all of them in the same step.
        """
        self._launch()
        try:
            with explained(f"'{name}' in the group", self._recipe):
                _announce({"call": name, **order})
                return do()
        except DivergedError:
            raise
        except FedloomError as error:
            self._out_of_step = True
            if isinstance(error, RunError):
                error.process_is_lost = True
            raise

    def _launch(self) -> None:
        """Have every rank build its DeepSpeed engine: a collective act, so none may do it alone."""
        if self._out_of_step:
            raise SystemExit("the DeepSpeed group is out of step after an error; it must be started again")
        if not self._used:
            self._used = True
            self._call("launch", self._engine.launch)

    def _reopen_if_used(self) -> None:
        """Load the model again to go back, since DeepSpeed has changed it for good."""
        if self._used:
            self._launch()
            self._engine.close()
            _announce({"call": "open", "recipe": self._recipe.to_yaml()})
            self._engine = _open_together(self._recipe)
            self._used = False


def follow() -> NoReturn:
    """Carry out what rank 0 announces until it closes the engine; then exit the process."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)  # rank 0 decides when to stop
    engine: Engine | None = None
    while True:
        try:
            order = _hear()
        except RuntimeError:
            leave(1)  # rank 0 has gone, and has said why
        call = order.pop("call")
        try:
            if call == "open":
                if engine is not None:
                    engine.close()
                engine = _open_together(parse_recipe(order["recipe"]))
            elif call == "close":
                dist.destroy_process_group()
                leave(0)
            elif engine is not None:
                with explained(f"'{call}' in the group", engine.recipe):
                    _carry_out(engine, call, order)
        except FedloomError as error:
            # Rank 0 hears why a group cannot be opened, and sees with the others that a loss is no number. Any other
            # failure may be this process's alone, and the others would wait for it: with it the group ends.
            if call != "open" and not isinstance(error, DivergedError):
                _log.error("process %d on %s: %s", dist.get_rank(), socket.gethostname(), error)
                leave(1)


def _carry_out(engine: Engine, call: str, order: dict[str, Any]) -> None:
    if call == "write_state":
        engine.write_state(_receive_state(engine.manifest))
    elif call == "begin_round":
        engine.begin_round(_receive_state(engine.manifest), missed_rounds=order["missed_rounds"])
    elif call in ("train", "skip"):
        getattr(engine, call)(order["steps"])
    elif call == "restore":
        _restore_together(engine, Path(order["folder"]))
    elif call in ("checkpoint", "save_model"):
        getattr(engine, call)(Path(order["folder"]))
    else:
        getattr(engine, call)()


def _open_together(recipe: Recipe) -> Engine:
    """The recipe's engine on every rank, or an error on every rank."""
    # While an earlier engine's ZeRO-3 is still set, transformers loads a model in parts, and there are no whole weights
    # to put a head on, to merge or to quantise.
    unset_hf_deepspeed_config()
    return _together(lambda: open_engine(recipe))


def _restore_together(engine: Engine, folder: Path) -> dict[str, Any]:
    """Go back to a checkpoint on every rank, once all of them have found theirs to be whole."""
    _together(lambda: engine.check_checkpoint(folder))
    return engine.restore(folder)


def _together(do: Callable[[], Result]) -> Result:
    """Do the same on every rank. If a rank fails (a file may be missing on one machine only), all raise its error."""
    result: Result | None = None
    failure: FedloomError | None = None
    try:
        result = do()
    except FedloomError as error:
        failure = error
    failed = torch.zeros(dist.get_world_size())
    failed[dist.get_rank()] = failure is not None
    dist.all_reduce(failed, group=_calls)
    first = int(failed.argmax())
    if failed[first] and first == dist.get_rank():
        words = f"process {first} on {socket.gethostname()}: {failure}" if first else str(failure)
        _announce({"error": words, "input": isinstance(failure, InputError)}, first)
    elif failed[first]:
        heard = _hear(first)
        failure = InputError(heard["error"]) if heard["input"] else RunError(heard["error"])
    if failure is not None:
        raise failure
    return cast(Result, result)


def _announce(order: dict[str, Any], source: int = 0) -> None:
    data = torch.frombuffer(bytearray(json.dumps(order).encode()), dtype=torch.uint8)
    dist.broadcast(torch.tensor([len(data)]), src=source, group=_calls)
    dist.broadcast(data, src=source, group=_calls)


def _hear(source: int = 0) -> dict[str, Any]:
    size = torch.zeros(1, dtype=torch.long)
    dist.broadcast(size, src=source, group=_calls)
    data = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, src=source, group=_calls)
    document = json.loads(data.numpy().tobytes())
    if not isinstance(document, dict):
        raise RunError(f"process {source} announced something that is no call")
    return document


def _broadcast_state(state: TrainableState) -> None:
    dist.broadcast(torch.from_numpy(state.buffer.copy()), src=0, group=_calls)


def _receive_state(manifest: Manifest) -> TrainableState:
    values = torch.empty(manifest.size, dtype=torch.float32)
    dist.broadcast(values, src=0, group=_calls)
    return TrainableState(manifest, values.numpy())
