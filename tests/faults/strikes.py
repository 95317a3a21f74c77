"""The faults: what each does to a component, for how long, and how it is taken back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass

from tests.faults.world import Run, World

HOUR = 3600


class NothingToHit(Exception):
    """The component has no process just now."""


@dataclass(frozen=True)
class Fault:
    """Entering `strike` strikes; leaving it, after `seconds`, takes the fault back. A kill is not taken back."""

    name: str
    says: str
    seconds: float
    strike: Callable[[World, Run, str], AbstractContextManager[None]]


def _processes(world: World, run: Run, component: str) -> list[int]:
    if not (processes := world.processes(component, run)):
        raise NothingToHit(component)
    return processes


def _signal(processes: list[int], number: signal.Signals) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


@contextmanager
def _kill(world: World, run: Run, component: str) -> Iterator[None]:
    _signal(_processes(world, run, component), signal.SIGKILL)
    yield


@contextmanager
def _stop(world: World, run: Run, component: str) -> Iterator[None]:
    processes = _processes(world, run, component)
    _signal(processes, signal.SIGSTOP)
    try:
        yield
    finally:
        _signal(processes, signal.SIGCONT)


@contextmanager
def _fill_disk(world: World, run: Run, component: str) -> Iterator[None]:
    disk = world.disks[component]
    disk.fill()
    try:
        yield
    finally:
        disk.make_room()


@contextmanager
def _jump(world: World, run: Run, component: str) -> Iterator[None]:
    processes = _processes(world, run, component)
    world.clocks.move(processes, HOUR)
    try:
        yield
    finally:
        world.clocks.move(processes, 0)


def _on_the_line(name: str) -> Callable[[World, Run, str], AbstractContextManager[None]]:
    @contextmanager
    def strike(world: World, run: Run, component: str) -> Iterator[None]:
        lines = world.lines if component == "all lines" else world.lines[:1]
        for line in lines:
            getattr(line, name)()
        try:
            yield
        finally:
            for line in lines:
                line.mend()

    return strike


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("kill", "SIGKILL to the component's processes", 0, _kill),
        Fault("stop 20 s", "SIGSTOP, and SIGCONT after 20 s", 20, _stop),
        Fault(
            "disk full",
            "the disk of the component's folder, a file system of its own, is filled to the last page for 8 s",
            8,
            _fill_disk,
        ),
        Fault(
            "clock jump",
            "the wall clock of the component's processes jumps an hour ahead, and back after 8 s; clocks that do not "
            "jump by themselves (monotonic ones) stay, as on a real machine",
            8,
            _jump,
        ),
        Fault("cut", "all connections of the line are reset, and each new one for 5 s", 5, _on_the_line("cut")),
        Fault("delayed", "no byte passes for 5 s, in either direction; then all of them", 5, _on_the_line("hold")),
        Fault(
            "duplicated",
            "for 3 s the connection is reset in the place of each answer, so that all that was asked, and carried out, "
            "is asked again; and what was sent on the open connections is sent once more, byte for byte, on others",
            3,
            _on_the_line("double"),
        ),
    )
}
"""All faults, by name."""


def hold_for(seconds: float) -> None:
    """Let a fault last."""
    time.sleep(seconds)
