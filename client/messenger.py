"""The process between the site's SuperNode and its worker: `python -m client.messenger SOCKET SECRET_FILE`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from client.app import SITE_FOLDER, app
from client.site_config import load_site_config
from core_training.foundation.careful_logging import log_carefully
from flower_transport.messenger import serve
from security.private_files import read_private_file
from security.private_sockets import address_of

if __name__ == "__main__":
    log_carefully()
    with address_of(Path(sys.argv[1])) as address:
        most = load_site_config(Path(os.environ[SITE_FOLDER])).max_message_bytes
        serve(app, address, secret=read_private_file(Path(sys.argv[2])), max_message_bytes=most)
