"""A stranger on the machine: reads, connects and calls what it is told to, as an account that owns nothing.

`python -m tests.strange_account` takes an `Attempts` as JSON on standard input, gives up root's rights, and writes what
succeeded as a `Haul` on standard output.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401 - as itself it may not be able to read any more modules
import http.client
import json
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial

import grpc
import pytest

NOBODY = 65534
needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can act as another account of this machine"
)
_WAITS = 2.0
_AT_ONCE = 4


@dataclass(frozen=True)
class Attempts:
    """Files to open, unix sockets to connect to, and what to ask at which addresses: HTTP's paths, gRPC's methods."""

    files: list[str] = field(default_factory=list)
    sockets: list[str] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Haul:
    """What was opened and connected to, and the answer to each call: a status of HTTP or gRPC, or an error's name."""

    opened: list[str]
    connected: list[str]
    answers: dict[str, str]

    @property
    def taken(self) -> list[str]:
        """Everything that a stranger should not have got."""
        return [*self.opened, *self.connected, *(call for call, said in self.answers.items() if _is_granted(said))]

    def said_at(self, address: str) -> set[str]:
        """All that was answered at an address."""
        return {said for call, said in self.answers.items() if f"{address}/" in call}


def attack(attempts: Attempts) -> Haul:
    """Have the stranger try. To be called by root."""
    command = [sys.executable, "-m", "tests.strange_account"]
    finished = subprocess.run(command, input=json.dumps(asdict(attempts)), capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return Haul(**json.loads(finished.stdout))


def _is_granted(said: str) -> bool:
    return said == "OK" or said.startswith(("1", "2", "3"))


def _succeeds(do: Callable[[], object]) -> bool:
    try:
        do()
    except OSError:
        return False
    return True


def _open(path: str) -> None:
    with open(path, "rb") as file:
        file.read(1)


def _connect(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_WAITS)
        connection.connect(path)


def _http(address: str, path: str, *, tls: bool) -> str:
    """The status of a POST; the server may be whoever it is."""
    host, _, port = address.rpartition(":")
    if tls:
        context = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection(host, int(port), timeout=_WAITS, context=context)
    else:
        connection = http.client.HTTPConnection(host, int(port), timeout=_WAITS)
    try:
        connection.request("POST", path, b"", {"Content-Type": "application/protobuf"})
        return str(connection.getresponse().status)
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    finally:
        connection.close()


def _grpc(address: str, method: str) -> str:
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(method)(b"", timeout=_WAITS)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def main() -> None:
    attempts = Attempts(**json.load(sys.stdin))
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    calls: dict[str, Callable[[], str]] = {}
    for address in attempts.addresses:
        for path in attempts.paths:
            calls[f"http://{address}{path}"] = partial(_http, address, path, tls=False)
            calls[f"https://{address}{path}"] = partial(_http, address, path, tls=True)
        for method in attempts.methods:
            calls[f"{address}{method}"] = partial(_grpc, address, method)
    # Several at a time: some ports answer nothing at all, and each call waits for that.
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        answers = dict(zip(calls, threads.map(lambda call: call(), calls.values()), strict=True))
    haul = Haul(
        opened=[path for path in attempts.files if _succeeds(lambda path=path: _open(path))],
        connected=[path for path in attempts.sockets if _succeeds(lambda path=path: _connect(path))],
        answers=answers,
    )
    json.dump(asdict(haul), sys.stdout)


if __name__ == "__main__":
    main()
