"""Files that are there whole or not at all, whatever is killed and whenever: write beside, flush to disk, rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from core_training.foundation.errors import FedloomError, InputError, RunError
from core_training.foundation.strict_json import strict_json


def scratch_of(target: Path) -> Path:
    """The folder of `commit_folder(target)`'s files until they are committed."""
    return target.with_name(f".{target.name}.partial")


@contextmanager
def commit_folder(target: Path) -> Iterator[Path]:
    """Fill the folder this yields; on a clean exit it becomes `target` in one rename.

    On an exception nothing changes: an earlier `target` stays as it was. Raises RunError when the disk refuses.
    """
    scratch, replaced = scratch_of(target), target.with_name(f".{target.name}.replaced")
    try:
        if replaced.exists() and not target.exists():  # killed between the two renames below
            replaced.rename(target)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        yield scratch
        for path in sorted(scratch.rglob("*")):
            flush(path)
        flush(scratch)
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            target.rename(replaced)
        scratch.rename(target)
        flush(target.parent)
    except FedloomError:
        raise
    except Exception as error:
        if _is_disk_error(error):
            raise RunError(f"{target} could not be written ({error}); what was committed before is intact") from error
        raise
    finally:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def new_folder(to: Path, option: str = "--to") -> Path:
    """The absolute path of a folder to write, as named with `option`.

    Raises InputError for a file, where something is in it, and where nobody may look.
    """
    try:
        if to.exists() and not to.is_dir():
            raise InputError(f"{option}: {to} is a file; name a new folder")
        if to.is_dir() and any(to.iterdir()):
            raise InputError(f"{option}: {to} exists and is not empty; name a new folder")
    except OSError as error:
        raise InputError(f"{option}: {to} cannot be used: {error.strerror}; name a new folder") from None
    return to.resolve()


def share(folder: Path) -> None:
    """Give the files in a new folder the modes that umask says: safetensors lets their owner alone read them."""
    readers = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(readers)


def commit_file(target: Path, data: bytes) -> None:
    """Replace `target` by `data` in one rename. Raises RunError when the disk refuses."""
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(data)
        flush(scratch)
        scratch.rename(target)
        flush(target.parent)
    except OSError as error:
        raise RunError(f"{target} could not be written ({error}); what was there before is intact") from error
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


def commit_json(target: Path, document: Any) -> None:
    """Make a document for people and programs, as indented JSON, the content of `target`: see `commit_file`."""
    commit_file(target, (strict_json(document, indent=2) + "\n").encode())


def _is_disk_error(error: BaseException | None) -> bool:
    # torch and safetensors report a failed write as errors of their own kind, with the system's text inside; torch
    # then fails again while it closes the file, which hides the first error behind another.
    texts = (
        "PytorchStreamWriter",
        "file write failed",
        "No space left",
        "File too large",
        "os error",
        "iostream error",
    )
    while error is not None:
        if isinstance(error, OSError) or any(text in str(error) for text in texts):
            return True
        error = error.__cause__ or error.__context__
    return False


def flush(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
