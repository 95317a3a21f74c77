"""Flower's simulation on Ray: the nodes' orders are answered in several processes of this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from threading import Event
from typing import TypeVar

from core_training.foundation.errors import RunError
from core_training.foundation.stopping import StopNow, StopRequest, hears_signals, stopping_when_ready
from flower_transport.apps import Handle, make_client_app, make_server_app
from flower_transport.grid import Grid
from flower_transport.private_ray import private_ray
from flower_transport.reply import Reply
from strategies.messages import Envelope

Result = TypeVar("Result")

os.environ["RAY_DISABLE_FAILURE_SIGNAL_HANDLER"] = "1"  # read when Ray is imported; see `_leave_signals_alone`

_WHO = "which-partition"
_NODES_APPEAR_WITHIN = 60.0


def run_on_ray(
    handle: Handle, sites: int, carry_out: Callable[[Grid, Mapping[int, int]], Result], session: Path
) -> Result:
    """The result of a run: `carry_out(grid, which site, from 0, each node is)`; its exceptions are raised here.

    `handle(order, site)` answers in a process of Ray's, to which it is pickled. Ray keeps its session in `session`. A
    signal ends it as any other block.
    """
    outcome: list[Result | BaseException] = []
    stopped = Event()

    def serve(grid: Grid, _: str) -> None:
        grid = _StoppableGrid(grid, stopped)
        try:
            outcome.append(carry_out(grid, _sites_of(grid, sites)))
        except BaseException as error:
            outcome.append(error)

    with private_ray(session) as options:
        from flwr.simulation import run_simulation  # loads Ray

        _leave_signals_alone()
        heeding = stopping_when_ready(lambda _: stopped.set()) if hears_signals() else nullcontext(StopRequest())
        try:
            with heeding as request:
                run_simulation(
                    server_app=make_server_app(serve),
                    client_app=make_client_app(_TellsItsSite(handle)),
                    num_supernodes=sites,
                    backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": options},
                )
        finally:
            stopped.set()
    if request.number is not None:
        raise StopNow(request.number)
    if not outcome:
        raise RunError("Flower's simulation ended before the run did")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _leave_signals_alone() -> None:
    """Keep Ray from taking SIGTERM for itself: it would kill the sites first, and leave no time to say anything."""
    import ray._private.utils

    ray._private.utils.set_sigterm_handler = lambda handler: None


class _StoppableGrid:
    """A grid that ends, at its next call, the thread in which the rounds go on beside the one that hears signals."""

    def __init__(self, grid: Grid, stopped: Event) -> None:
        self._grid = grid
        self._stopped = stopped

    def nodes(self) -> list[int]:
        self._check()
        return self._grid.nodes()

    def send(self, envelopes: Mapping[int, Envelope], ttl: float) -> dict[str, int]:
        self._check()
        return self._grid.send(envelopes, ttl)

    def allow_payloads(self, payload_bytes: int) -> None:
        self._grid.allow_payloads(payload_bytes)

    def replies(self, orders: Sequence[str], patience: float) -> Iterator[Reply]:
        self._check()
        return self._grid.replies(orders, patience)

    def _check(self) -> None:
        if self._stopped.is_set():
            raise RunError("the simulation was stopped")


class _TellsItsSite:
    """A handler that says which site a node is, unknown to Flower's server, and leaves the rest to `handle`."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def __call__(self, order: Envelope, site: int) -> Envelope:
        return Envelope.of(_WHO, {"site": site}) if order.kind == _WHO else self._handle(order, site)


def _sites_of(grid: Grid, sites: int) -> dict[int, int]:
    """Flower's random node numbers with the sites that they are."""
    deadline = time.monotonic() + _NODES_APPEAR_WITHIN
    while len(nodes := grid.nodes()) < sites:
        if time.monotonic() > deadline:
            raise RunError(f"Flower's simulation has {len(nodes)} of {sites} sites after {_NODES_APPEAR_WITHIN:g} s")
        time.sleep(0.1)
    waiting = grid.send({node: Envelope.of(_WHO, {}) for node in nodes}, ttl=3600.0)
    found: dict[int, int] = {}
    while waiting:
        for reply in grid.replies(list(waiting), patience=0.05):
            found[waiting.pop(reply.order)] = reply.envelope().fields["site"]
    return found
