"""A site's standing with the server, in `run/link.json`: its SuperNode notes it, whoever asks reads it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from core_training.foundation.bounded_reading import read_json
from core_training.foundation.durable import commit_file
from core_training.foundation.foreign_text import harmless

_LINK_FILE = Path("run") / "link.json"
_MOST_BYTES = 2**20

State = Literal["connecting", "connected", "refused"]


@dataclass(frozen=True)
class Link:
    """The site's standing with the server.

    `node_id` is Flower's number of the site, once it has ever been connected; `detail` says why it was refused.
    """

    state: State
    node_id: int | None = None
    detail: str = ""


def read_link(folder: Path) -> Link:
    """The newest note."""
    try:
        return Link(**read_json(folder / _LINK_FILE, _MOST_BYTES))
    except (FileNotFoundError, ValueError, TypeError):
        return Link("connecting")


def note_link(folder: Path, state: State, node_id: int | None = None, detail: str = "") -> None:
    """Note the site's standing; keep a number that it once had."""
    link = Link(state, node_id if node_id is not None else read_link(folder).node_id, harmless(detail))
    commit_file(folder / _LINK_FILE, json.dumps(asdict(link)).encode())
