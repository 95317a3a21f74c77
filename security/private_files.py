"""Files that only their owner may read: private keys. Knows how to write and read them safely, not what is in them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from core_training.foundation.bounded_reading import ForeignTextError, bounded, open_regular, reason_of
from core_training.foundation.durable import flush
from core_training.foundation.errors import InputError, RunError

LARGEST_KEY_FILE = 64 * 2**10
"""Bytes of a file with a key or a certificate, private or public: twenty times what the longest have."""


def make_private_folder(folder: Path) -> None:
    """Make `folder` (and its parents); nobody but its owner may enter it (0700).

    Raises InputError where none can be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror}; name another folder") from None


def write_private_file(path: Path, data: bytes) -> None:
    """Write a new file that only its owner may read (0600 from the first moment on).

    Raises InputError when the file is there already: a key is never overwritten.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise InputError(f"{path}: there is a key already; remove it first, or choose another folder") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_private_file(path: Path, data: bytes) -> None:
    """Replace a file that only its owner may read, whole or not at all, and on the disk when this returns."""
    scratch = path.with_name(f".{path.name}.new")  # one name: what a kill leaves there, the next save removes
    try:
        scratch.unlink(missing_ok=True)
        write_private_file(scratch, data)
        scratch.rename(path)
        flush(path.parent)
    except OSError as error:
        raise RunError(f"{path} could not be written ({error}); what was there before is intact") from error
    finally:
        scratch.unlink(missing_ok=True)


def read_private_file(path: Path, most: int = LARGEST_KEY_FILE) -> bytes:
    """Read a private file of at most so many bytes.

    Raises InputError when it is missing, a pipe or a device, or larger, and when others than its owner may read it.
    """
    try:
        with open_regular(path) as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = bounded(file, most)
    except (OSError, ForeignTextError) as error:
        raise InputError(f"{path}: the private key cannot be read: {reason_of(error)}") from None
    if mode & 0o077:
        raise InputError(f"{path}: others may read this private key (mode {mode:04o}); chmod 600 {path}")
    return data
