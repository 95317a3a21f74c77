"""The site's SuperNode: `python -m client.supernode SITE_FOLDER`."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from client.app import SITE_FOLDER, app
from client.link import note_link
from client.site_config import load_site_config
from core_training.foundation.careful_logging import log_to_stdout
from core_training.foundation.errors import InputError
from core_training.foundation.stopping import exit_when_stopped
from flower_transport.supernode import SuperNode
from security.certificates import AUTHORITY_CERTIFICATE
from security.private_files import read_private_file


def main() -> None:
    """Answer the server's orders to the site whose folder is given on the command line."""
    log_to_stdout()
    exit_when_stopped()
    folder = Path(sys.argv[1])
    os.environ[SITE_FOLDER] = str(folder)
    config = load_site_config(folder)
    key = load_ssh_private_key(read_private_file(folder / "keys" / "node.key"), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError(f"{folder / 'keys' / 'node.key'}: this is no key of a site")
    supernode = SuperNode(
        app,
        server=str(config.server),
        authority=folder / AUTHORITY_CERTIFICATE,
        key=key,
        note=lambda state, node_id, detail: note_link(folder, state, node_id, detail),
        max_message_bytes=config.max_message_bytes,
    )
    try:
        supernode.run()
    except httpx.HTTPError as error:
        logging.error("this SuperNode ends, to be started anew: %s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
