"""A socket and a credential that another account of this machine finds: it can neither use nor replace them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flower_transport.credential import make_credential
from security.private_files import make_private_folder
from security.private_sockets import address_of, listen

BECOME_ANOTHER = "import os, socket, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534)"
ATTACKS = {
    "connects": "socket.socket(socket.AF_UNIX).connect(sys.argv[1])",
    "takes the place": "os.unlink(sys.argv[1]); socket.socket(socket.AF_UNIX).bind(sys.argv[1])",
    "takes a name": "socket.socket(socket.AF_UNIX).bind(sys.argv[1] + '2')",
    "moves it away": "os.rename(sys.argv[1], sys.argv[1] + '2')",
    "reads the credential": "open(os.path.dirname(sys.argv[1]) + '/credential').read()",
}


@pytest.fixture
def run() -> Iterator[Path]:
    """A folder for sockets that everybody can find the way to, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as way:
        os.chmod(way, 0o755)
        yield Path(way) / "run"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to act as another account")
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_another_account_neither_connects_nor_takes_the_place(run: Path, attack: str, mode: int) -> None:
    make_private_folder(run)
    make_credential(run / "credential")
    with listen(run / "socket"):
        run.chmod(mode)  # the files hold where somebody opened the folder to be looked at
        code = f"{BECOME_ANOTHER}; {ATTACKS[attack]}"
        command = [sys.executable, "-c", code, str(run / "socket")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode != 0
        assert "PermissionError" in done.stderr


def test_a_socket_takes_the_place_of_the_one_before_and_is_its_owners_alone(run: Path) -> None:
    make_private_folder(run)
    with listen(run / "socket") as first, listen(run / "socket") as second:
        assert (run / "socket").stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as caller, address_of(run / "socket") as address:
            caller.connect(address)
            second.settimeout(20)
            second.accept()[0].close()
            first.setblocking(False)
            with pytest.raises(BlockingIOError):
                first.accept()
