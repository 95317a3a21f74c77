"""The site's SuperNode: `python -m client.supernode SITE_FOLDER DESCRIPTOR …`, with the options of `flower-supernode`.

The descriptor is that of the bound socket on which it serves the messenger.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from client.link import note_link
from core_training.foundation.careful_logging import log_carefully
from flower_transport.supernode import run

if __name__ == "__main__":
    log_carefully()
    folder, descriptor = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
    run(
        lambda state, node_id, detail: note_link(folder, state, node_id, detail),
        listener=socket.socket(fileno=descriptor),
    )
