"""Flower's SuperLink behind a gate: sites reach what is theirs, the operator shows a credential for all else.

`python -m flower_transport.superlink CREDENTIAL_FILE …` takes the options of `flower-superlink`. It starts no
ServerApp: that is up to whoever operates it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import uvicorn
from flwr.supercore.http_logging import get_uvicorn_log_config
from flwr.supercore.logger import console_handler
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan, _parse_superlink_lifespan_config
from flwr.superlink.main import create_app

from core_training.foundation.careful_logging import carefully, log_carefully
from flower_transport.bounded_http import BoundedHttp
from flower_transport.credential import read_credential
from flower_transport.gate import Gate
from flower_transport.limits import BodyLimits
from security.connection_watch import ConnectionWatch, raise_descriptor_limit


def main() -> None:
    """Run the SuperLink until it is stopped."""
    credential = read_credential(Path(sys.argv.pop(1)))
    config = _parse_superlink_lifespan_config()
    app = create_app(config, SuperLinkLifespan)
    log_carefully()
    raise_descriptor_limit()
    watch = ConnectionWatch(config.port)
    watch.start()
    app.add_middleware(BodyLimits, watch=watch)  # behind the gate, which lets no call of the operator's in unproven
    app.add_middleware(Gate, credential=credential)
    uvicorn.run(
        app,
        host=config.host,
        port=config.port,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        log_config=carefully(get_uvicorn_log_config(console_handler.level)),
        access_log=False,
        proxy_headers=False,
        http=BoundedHttp,
        ws="none",
        workers=1,
    )


if __name__ == "__main__":
    main()
