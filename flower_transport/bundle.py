"""The bundle for the sites when a run begins. It holds no code: it names modules that every site has installed."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from core_training import __version__

RUN_ID = "run-id"
"""The run configuration's only key: it names the run to the ServerApp."""

BUNDLE: dict[str, bytes | Path] = {
    "README.md": b"This bundle holds no code: server and sites run the fedloom that they have installed.\n",
    "pyproject.toml": f"""\
[project]
name = "fedloom-run"
version = "{__version__}"
description = "Starts fedloom's ServerApp and ClientApp"
license = {{text = "Apache-2.0"}}
dependencies = []
[tool.flwr.app]
publisher = "fedloom"
[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"
[tool.flwr.app.config]
{RUN_ID} = ""
""".encode(),
}


@cache
def packed_bundle() -> bytes:
    """The bundle as Flower packs it: the same bytes in every process of this version."""
    from flwr.cli.build import build_fab_from_files  # a site's SuperNode, which packs nothing, need not load it

    packed: bytes = build_fab_from_files(BUNDLE)[0]
    return packed


def bundle_hash(packed: bytes) -> str:
    """SHA-256 of a packed bundle, by which Flower knows it."""
    return hashlib.sha256(packed).hexdigest()


def is_own_bundle(packed: bytes) -> bool:
    """Whether these bytes are the bundle of the fedloom that is installed here."""
    return bundle_hash(packed) == bundle_hash(packed_bundle())
