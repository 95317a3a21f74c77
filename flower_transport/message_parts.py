"""The parts of messages on their way through a SuperLink: long ones in files, so memory does not grow with them.

Whoever works for the same federation on the same machine brings and takes long parts by way of these files, and not
through the SuperLink's port: `PartsClient`.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse, PushObjectRequest, PushObjectResponse
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.runtime import RuntimeHttpClient

from security.private_files import make_private_folder

LONG_BYTES = 64 * 2**10
PARTS_FOLDER = "parts"

_IN_A_FILE = b"\0"
"""Stands in memory for a part that lies in a file. No part is as short: each says what it is."""

BROUGHT = b"\1"
"""Stands in a call for a part whose file is there already."""


class MessageParts(InMemoryObjectStore):  # type: ignore[misc]
    """Flower's store of parts. The files outlive no SuperLink: with it, the runs end whose messages they are."""

    def __init__(self, folder: Path) -> None:
        """Keep the files in `folder`, which is emptied."""
        super().__init__(verify=False)
        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        make_private_folder(folder)

    def put(self, object_id: str, object_content: bytes) -> None:
        file = self._folder / object_id
        content = file.read_bytes() if object_content == BROUGHT and object_id in self else object_content
        if get_object_id(content) != object_id:
            raise ValueError(f"Object ID {object_id} does not match content hash")
        validate_object_content(content=content)
        with self.lock_store:
            if len(content) <= LONG_BYTES:
                super().put(object_id, content)
                return
            entry = self.store.get(object_id)
            if entry is not None and not entry.is_available and object_content != BROUGHT:
                file.write_bytes(content)
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
            super().delete(object_id)
            if object_id not in self.store:
                (self._folder / object_id).unlink(missing_ok=True)


class PartsClient(RuntimeHttpClient):  # type: ignore[misc]
    """Flower's client of a SuperLink on this machine, whose files in `folder` it may read and write."""

    folder: Path | None = None

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:
        try:
            content = (self.folder / request.object_id).read_bytes() if self.folder is not None else b""
        except FileNotFoundError:
            content = b""
        if content:
            return PullObjectResponse(object_found=True, object_available=True, object_content=content)
        response: PullObjectResponse = super().PullObject(request)
        return response

    def PushObject(self, request: PushObjectRequest) -> PushObjectResponse:
        if self.folder is not None and len(request.object_content) > LONG_BYTES:
            scratch = self.folder / f".{secrets.token_hex(8)}"
            scratch.write_bytes(request.object_content)
            os.replace(scratch, self.folder / request.object_id)
            request.object_content = BROUGHT
        response: PushObjectResponse = super().PushObject(request)
        return response
