"""Unix sockets that only their owner may connect to. Knows how to listen on one, not what is said."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core_training.foundation.socket_paths import short_path


def listen(path: Path) -> socket.socket:
    """Take the place of whoever listened at `path` before; the socket is its owner's alone (0600).

    The folder must be one in which nobody else may write. Raises OSError when the socket cannot be made, InputError
    when its path is too long.
    """
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        with address_of(path) as address:
            listener.bind(address)
        listener.listen()
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener


@contextmanager
def address_of(path: Path) -> Iterator[str]:
    """The name by which to reach the socket at `path`, for as long as the context lasts."""
    with short_path(path.parent, len(os.fsencode(f"/{path.name}"))) as folder:
        yield str(folder / path.name)
