"""The server's address as a site writes it."""

from __future__ import annotations

from core_training.foundation.errors import InputError


def parse_server(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`. Raises InputError on anything else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"server: '{address}' is not HOST:PORT, such as server.example.org:9092")
    return host.strip("[]"), int(port)
