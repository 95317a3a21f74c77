"""The parts of messages on their way through a SuperLink: long ones in files, so memory does not grow with them.

Whoever works for the same federation on the same machine brings and takes long parts by way of these files, and not
through the SuperLink's port: `PartsClient`.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path

from flwr.proto.message_pb2 import (
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
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

_MOST_PARTS = 100_000
"""Of one message: those of half a terabyte."""

_MOST_SHORT_BYTES = 64 * 2**20
"""Of one site's parts that are in memory: an answer has a few, beside its long ones."""

_MOST_LEVELS = 8
"""From a message down to its chunks there are five."""


class MessageParts(InMemoryObjectStore):  # type: ignore[misc]
    """Flower's store of parts. The files outlive no SuperLink: with it, the runs end whose messages they are."""

    def __init__(self, folder: Path) -> None:
        """Keep the files in `folder`, which is emptied."""
        super().__init__(verify=False)
        self._folder = folder
        self._bringers: dict[str, tuple[int, int]] = {}
        """The site that brought a part, and the part's bytes."""
        self._brought: Counter[tuple[int, bool]] = Counter()
        """The bytes of each site's parts, those in files (True) and those in memory."""
        shutil.rmtree(folder, ignore_errors=True)
        make_private_folder(folder)

    def preregister(self, run_id: int, object_tree: ObjectTree) -> list[str]:
        """Raises ValueError for a tree that is none: walking it again would take for ever."""
        with self.lock_store:
            self._check(object_tree)
            missing: list[str] = super().preregister(run_id, object_tree)
            return missing

    def settle(self, object_id: str, content: bytes, site: int | None = None) -> bytes:
        """Have the part's file ready, where it is long; returns what `put` takes. `site` is the number of its bringer.

        Hashes and writes with no lock held. Raises ValueError for another part than this one, and where a site brings
        more than it may; OSError.
        """
        file = self._folder / object_id
        brought = content == BROUGHT
        if brought and self.is_there(object_id):
            return _IN_A_FILE
        if brought and self.is_awaited(object_id):
            content = file.read_bytes()
        if get_object_id(content) != object_id:
            raise ValueError(f"Object ID {object_id} does not match content hash")
        validate_object_content(content=content)
        if site is not None:
            self._charge(site, object_id, len(content))
        if len(content) <= LONG_BYTES:
            return content
        if not brought and self.is_awaited(object_id):
            write_part(file, content)
        return _IN_A_FILE

    def is_awaited(self, object_id: str) -> bool:
        """Whether the part was announced, and has not come."""
        entry = self.store.get(object_id)
        return entry is not None and not entry.is_available

    def is_there(self, object_id: str) -> bool:
        entry = self.store.get(object_id)
        return entry is not None and entry.is_available

    def put(self, object_id: str, object_content: bytes) -> None:
        """Take a part as `settle` returned it, or a short one. Raises as Flower's own."""
        if object_content is not _IN_A_FILE and len(object_content) > LONG_BYTES:
            object_content = self.settle(object_id, object_content)
        super().put(object_id, object_content)

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
                self._release(object_id)
                (self._folder / object_id).unlink(missing_ok=True)

    def _charge(self, site: int, object_id: str, size: int) -> None:
        """Note what a site brings. Raises ValueError where its parts would take more memory than any answers do.

        And where they would take more of the disk than they leave to all others.
        """
        in_file = size > LONG_BYTES
        with self.lock_store:
            self._release(object_id)
            taken = self._brought[site, in_file] + size
            most = shutil.disk_usage(self._folder).free - size if in_file else _MOST_SHORT_BYTES
            if taken > most:
                where = "of the disk than they leave free" if in_file else f"memory than {_MOST_SHORT_BYTES >> 20} MiB"
                raise ValueError(f"the parts that site {site} has brought would take more {where}")
            self._bringers[object_id] = site, size
            self._brought[site, in_file] = taken

    def _release(self, object_id: str) -> None:
        """Forget who brought a part, if a site did."""
        if (brought := self._bringers.pop(object_id, None)) is not None:
            site, size = brought
            self._brought[site, size > LONG_BYTES] -= size

    def _check(self, tree: ObjectTree) -> None:
        """Raise ValueError where a part comes with others below it than before, or the tree is out of proportion."""
        below: dict[str, list[str]] = {}
        level = [tree]
        for _ in range(_MOST_LEVELS):
            following: list[ObjectTree] = []
            for part in level:
                children = [child.object_id for child in part.children]
                entry = self.store.get(part.object_id)
                known = below.setdefault(part.object_id, entry.child_object_ids if entry else children)
                if children != known or len(set(children)) < len(children) or len(below) > _MOST_PARTS:
                    raise ValueError(f"the parts of {part.object_id} are not those that it has, or far too many")
                following += part.children
            level = following
        if level:
            raise ValueError(f"the parts of {tree.object_id} lie in more than {_MOST_LEVELS} levels")


class PartsClient(RuntimeHttpClient):  # type: ignore[misc]
    """Flower's client of a SuperLink on this machine, whose files in `folder` it may read and write."""

    folder: Path | None = None

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:
        if self.folder is not None:
            with suppress(FileNotFoundError):
                content = (self.folder / request.object_id).read_bytes()
                return PullObjectResponse(object_found=True, object_available=True, object_content=content)
        response: PullObjectResponse = super().PullObject(request)
        return response

    def PushObject(self, request: PushObjectRequest) -> PushObjectResponse:
        if self.folder is not None and len(request.object_content) > LONG_BYTES:
            write_part(self.folder / request.object_id, request.object_content)
            request.object_content = BROUGHT
        response: PushObjectResponse = super().PushObject(request)
        return response


def write_part(file: Path, content: bytes) -> None:
    """Put a part where it is looked for, whole or not at all. Raises OSError, and leaves nothing behind."""
    scratch = file.parent / f".{secrets.token_hex(8)}"
    try:
        scratch.write_bytes(content)
        os.replace(scratch, file)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
