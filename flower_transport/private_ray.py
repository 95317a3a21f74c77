"""A Ray of one run's own: on the loopback interface alone, behind a token, its sockets in a folder of this account.

Ray runs whatever it is sent. By itself it listens on every interface, joins whichever Ray another account of the
machine announces in /tmp/ray, and lets everybody into its session folder.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core_training.foundation.errors import InputError, RunError
from core_training.foundation.socket_paths import short_path
from security.private_files import make_private_folder, write_private_file

_LOOPBACK = "127.0.0.1"
_LONGEST_SOCKET = len("/s/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
_TOKEN = secrets.token_hex(32)
"""The token of this process's Rays: Ray reads it once, and keeps it."""


@contextmanager
def private_ray(folder: Path) -> Iterator[dict[str, Any]]:
    """The arguments of `ray.init` for a Ray that keeps its session in `folder`, which only this account may enter.

    The folder is replaced, and removed when the block ends well; the logs of a session that failed stay. Raises
    InputError when no path to it is short enough for a socket, and RunError when Ray was in use here before.
    """
    shutil.rmtree(folder, ignore_errors=True)
    make_private_folder(folder)
    write_private_file(folder / "token", _TOKEN.encode())
    with short_path(folder, _LONGEST_SOCKET) as short:
        _close_ray(folder / "token")
        yield {
            "address": "local",  # never one that is announced somewhere
            "include_dashboard": False,
            "log_to_driver": False,
            "_temp_dir": str(short / "s"),  # not the folder itself: Ray opens its own to everybody
        }
    shutil.rmtree(folder, ignore_errors=True)


def check_ray() -> None:
    """Raise InputError when Ray is not installed."""
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise InputError("simulation.engine: 'ray' needs Ray: pip install 'fedloom[simulation]'")


def _close_ray(token: Path) -> None:
    """Have Ray listen on loopback alone and ask for the token, in this process and in those that it starts."""
    os.environ.pop("RAY_AUTH_TOKEN", None)  # it would go before the file
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token.absolute()),
        # Ray's name for having one machine only, read as it is imported; an address that it is given it replaces.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    import ray

    if ray.is_initialized() or ray.util.get_node_ip_address() != _LOOPBACK:
        raise RunError(
            "simulation.engine: this process has used Ray before, open to others; run `fedloom simulate` in a process "
            "of its own"
        )
