"""The site's SuperNode: `python -m client.supernode SITE_FOLDER …`, with the options of `flower-supernode`."""

from __future__ import annotations

import sys
from pathlib import Path

from client.link import note_link
from flower_transport.supernode import run

if __name__ == "__main__":
    folder = Path(sys.argv.pop(1))
    run(lambda state, node_id, detail: note_link(folder, state, node_id, detail))
