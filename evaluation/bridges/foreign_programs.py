"""Programs of others as processes: bounded in time, ended with what they started, without network where that goes.

What they print goes to a file, never to a pipe, which a process that they left behind could hold open for ever. Of this
process's variables they are given those that are named here: not the tokens and keys that lie among the others.
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

_NO_NETWORK = ("unshare", "--map-root-user", "--net")
_NO_ESCAPE = (*_NO_NETWORK, "--pid", "--fork", "--kill-child")
_FENCES = ((*_NO_ESCAPE, "--mount-proc"), _NO_ESCAPE, _NO_NETWORK)
"""From the strongest on. The first two end what has left its session, too; many containers refuse /proc of its own."""
_PROBE_SECONDS = 10.0
_SHOWN = 400
_NOWHERE = "http://127.0.0.1:9"
"""A proxy where nobody listens: what heeds proxies reaches nobody, on machines that have no fence, too."""

_GIVEN = frozenset(
    (
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH"),
        # A model that is asked: where it lies, whether anything may be fetched, on what it computes, and how.
        *("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"),
        *("FEDLOOM_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"),
        *("CUDA_HOME", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES"),
        *("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
        *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
        *("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "CUBLAS_WORKSPACE_CONFIG"),
    )
)
"""The variables that a program is given as this process has them."""
_GIVEN_FROM = ("LC_",)


@dataclass(frozen=True)
class Program:
    """A program as it is to be run: its command, where, with which variables besides those that any is given."""

    name: str
    command: Sequence[str]
    folder: Path
    environment: Mapping[str, str]
    seconds: float


@functools.cache
def fence() -> tuple[str, ...]:
    """What stands before a command that is to have no network; empty where this machine makes no such namespaces.

    Where it makes those of processes, the command's end is that of all that it started, whatever session they are in.
    """
    if shutil.which(_NO_NETWORK[0]) is None:
        return ()
    return next((command for command in _FENCES if _is_made(command)), ())


def _is_made(command: tuple[str, ...]) -> bool:
    try:
        tried = subprocess.run(
            [*command, "true"], capture_output=True, timeout=_PROBE_SECONDS, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return tried.returncode == 0


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
    """Run a program, all it prints appended to `log`; returns its exit code. What is in its session ends with it.

    Raises RunError where it cannot be started and where it takes longer than it may.
    """
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                program.command,
                cwd=program.folder,
                env={**_given(), **program.environment},
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


def _given() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name in _GIVEN or name.startswith(_GIVEN_FROM)}


def last_words(log: Path) -> str:
    """The end of what a program printed, as an error may show it."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4 * _SHOWN))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = " / ".join(lines[-4:])
    return shortened_text(said[-_SHOWN:], _SHOWN) if said else "nothing"
