"""The other end of a site's resident worker: it is started here, and given orders.

A worker may die and be started again by whoever looks after it; an order that was under way is then given to the new
one, which answers it alike. Knows nothing of Flower or of peers.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from socket import socket

from client import worker_socket
from client.site_config import load_site_config
from core_training.foundation import background
from core_training.foundation.errors import RunError
from strategies.messages import Envelope

LONGEST_ORDER = 12 * 3600.0
"""Seconds that an order may take: as long as Flower keeps a message."""

STARTS_WITHIN = 600.0
"""Seconds; one that ends is noticed at once. The first group of an account compiles an extension of DeepSpeed's."""
_ATTEMPTS = 3
_POLL_SECONDS = 0.05


def start_worker(folder: Path) -> subprocess.Popen[bytes]:
    """Start the worker of the site in `folder` and wait until it answers.

    Its output goes to `logs/worker.log`. Raises InputError when it runs already, RunError when it does not come up.
    """
    worker = background.start(worker_command(folder), worker_lock(folder), worker_log(folder))
    deadline = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < deadline and worker.poll() is None:
        try:
            worker_socket.connect(folder).close()
            return worker
        except OSError:
            time.sleep(_POLL_SECONDS)
    background.stop(worker_lock(folder))
    raise RunError(f"the worker of {folder} did not start; {worker_log(folder)} says why")


def ask(
    folder: Path,
    order: Envelope,
    timeout: float = LONGEST_ORDER,
    patience: float = 60.0,
    restart: Callable[[], object] = lambda: None,
) -> Envelope:
    """The worker's answer to an order.

    Waits up to `patience` seconds for a worker to be there, at first and whenever it is lost under way; `restart` is
    called again and again meanwhile, for a caller that looks after the worker itself. Raises
    RunError when there is none, when it was lost three times over this order, and after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    for _ in range(_ATTEMPTS):
        with _connect(folder, patience, restart) as connection:
            connection.settimeout(max(deadline - time.monotonic(), _POLL_SECONDS))
            try:
                worker_socket.send(connection, order)
                return worker_socket.receive(connection, load_site_config(folder).max_message_bytes)
            except TimeoutError:
                raise RunError(f"the worker gave no answer to '{order.kind}' within {timeout:.0f} seconds") from None
            except OSError:
                continue
    raise RunError(f"the worker was lost {_ATTEMPTS} times over '{order.kind}'; {worker_log(folder)} says why")


def worker_command(folder: Path) -> list[str]:
    """The command line of the worker."""
    return [sys.executable, "-m", "client.worker", str(folder)]


def worker_lock(folder: Path) -> Path:
    """The lock that the worker holds while it lives."""
    return folder / "run" / "worker.lock"


def worker_log(folder: Path) -> Path:
    """The worker's log file."""
    return folder / "logs" / "worker.log"


def _connect(folder: Path, patience: float, restart: Callable[[], object]) -> socket:
    deadline = time.monotonic() + patience
    while True:
        try:
            return worker_socket.connect(folder)
        except OSError:
            if time.monotonic() > deadline:
                raise RunError(f"no worker answers in {folder}; {worker_log(folder)} may say why") from None
        restart()
        time.sleep(_POLL_SECONDS)
