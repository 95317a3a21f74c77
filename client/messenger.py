"""The process between the site's SuperNode and its worker: `python -m client.messenger ADDRESS SECRET_FILE`."""

from __future__ import annotations

import sys
from pathlib import Path

from client.app import app
from flower_transport.messenger import serve
from security.private_files import read_private_file

if __name__ == "__main__":
    serve(app, address=sys.argv[1], secret=read_private_file(Path(sys.argv[2])))
