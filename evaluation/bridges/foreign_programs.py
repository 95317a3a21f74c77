"""Programs of others as processes: bounded in time, ended with all that they started, without network where that goes.

What they print goes to a file, never to a pipe, which a process that they left behind could hold open for ever.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from core_training.foundation.bounded_reading import shortened_text
from core_training.foundation.errors import RunError

_FENCE = ("unshare", "--map-root-user", "--net")
_PROBE_SECONDS = 10.0
_SHOWN = 400
_NOWHERE = "http://127.0.0.1:9"
"""A proxy where nobody listens: what heeds proxies reaches nobody, on machines that have no fence, too."""


@dataclass(frozen=True)
class Program:
    """A program as it is to be run: its command, where, with which variables besides this process's own."""

    name: str
    command: Sequence[str]
    folder: Path
    environment: Mapping[str, str]
    seconds: float


@functools.cache
def fence() -> tuple[str, ...]:
    """What stands before a command that is to have no network; empty where this machine makes no such namespaces."""
    if shutil.which(_FENCE[0]) is None:
        return ()
    try:
        tried = subprocess.run(
            [*_FENCE, "true"], capture_output=True, timeout=_PROBE_SECONDS, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return _FENCE if tried.returncode == 0 else ()


def run_alone(program: Program, log: Path) -> int:
    """Run a program without network where the machine can; returns its exit code. Raises RunError as `run`."""
    proxies = {name: _NOWHERE for scheme in ("http", "https", "all") for name in (f"{scheme}_proxy",)}
    proxies |= {name.upper(): value for name, value in proxies.items()}
    fenced = Program(
        program.name,
        [*fence(), *program.command],
        program.folder,
        {**proxies, **program.environment},
        program.seconds,
    )
    return run(fenced, log)


def run(program: Program, log: Path) -> int:
    """Run a program, all it prints appended to `log`; returns its exit code.

    Raises RunError where it cannot be started and where it takes longer than it may.
    """
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                program.command,
                cwd=program.folder,
                env={**os.environ, **program.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except OSError as error:
        raise RunError(f"{program.name} could not be started: {error}") from error
    try:
        return process.wait(program.seconds)
    except subprocess.TimeoutExpired:
        raise RunError(
            f"{program.name} took longer than {program.seconds:g} seconds and was ended; it said: {last_words(log)}"
        ) from None
    finally:
        with suppress(ProcessLookupError):  # whoever it started goes, too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_words(log: Path) -> str:
    """The end of what a program printed, as an error may show it."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4 * _SHOWN))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = " / ".join(lines[-4:])
    return shortened_text(said[-_SHOWN:], _SHOWN) if said else "nothing"
