"""The parts of messages on their way through a SuperLink: long ones in files, so memory does not grow with them."""

from __future__ import annotations

import shutil
from pathlib import Path

from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

from security.private_files import make_private_folder

LONG_BYTES = 64 * 2**10
_IN_A_FILE = b"\0"
"""Stands in memory for a part that lies in a file. No part is as short: each says what it is."""


class MessageParts(InMemoryObjectStore):  # type: ignore[misc]
    """Flower's store of parts. The files outlive no SuperLink: with it, the runs end whose messages they are."""

    def __init__(self, folder: Path) -> None:
        """Keep the files in `folder`, which is emptied."""
        super().__init__(verify=False)
        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        make_private_folder(folder)

    def put(self, object_id: str, object_content: bytes) -> None:
        if get_object_id(object_content) != object_id:
            raise ValueError(f"Object ID {object_id} does not match content hash")
        validate_object_content(content=object_content)
        if len(object_content) <= LONG_BYTES:
            super().put(object_id, object_content)
            return
        with self.lock_store:
            entry = self.store.get(object_id)
            if entry is None or not entry.is_available:
                if entry is not None:
                    (self._folder / object_id).write_bytes(object_content)
                super().put(object_id, _IN_A_FILE)

    def get(self, object_id: str) -> bytes | None:
        content: bytes | None = super().get(object_id)
        if content is not _IN_A_FILE:
            return content
        try:
            return (self._folder / object_id).read_bytes()
        except FileNotFoundError:  # deleted in between
            return None

    def delete(self, object_id: str) -> None:
        with self.lock_store:
            there = self.store.get(object_id)
            super().delete(object_id)
            if there is not None and there.content is _IN_A_FILE and object_id not in self.store:
                (self._folder / object_id).unlink(missing_ok=True)
