"""The bundle for the sites when a run begins. It holds no code: it names modules that every site has installed."""

from __future__ import annotations

from core_training import __version__

RUN_ID = "run-id"
"""The run configuration's only key: it names the run to the ServerApp."""

BUNDLE = {
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
