"""The process between the site's SuperNode and its worker: `python -m client.messenger SOCKET SECRET_FILE`."""

from __future__ import annotations

import sys
from pathlib import Path

from client.app import app
from core_training.foundation.careful_logging import log_carefully
from flower_transport.messenger import serve
from security.private_files import read_private_file
from security.private_sockets import address_of

if __name__ == "__main__":
    log_carefully()
    with address_of(Path(sys.argv[1])) as address:
        serve(app, address, secret=read_private_file(Path(sys.argv[2])))
