"""The Ray of a simulation: on loopback alone, with a token, in a folder that no other account may enter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

OWNER = """
import sys
from pathlib import Path
import core_training.foundation.environment
from flower_transport.private_ray import private_ray

with private_ray(Path(sys.argv[1])) as options:
    import ray
    ray.init(num_cpus=1, **options)
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
    ray.shutdown()
"""
CALLER = """
import sys
import ray

@ray.remote
def write(path):
    open(path, "w").close()

ray.init(address=sys.argv[1])
ray.get(write.remote(sys.argv[2]))
"""


def variables(**own: str) -> dict[str, str]:
    """This process's variables without Ray's, and these."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | own


def call(address: str, proof: Path, **own: str) -> subprocess.CompletedProcess[str]:
    """A task for the Ray at `address`, which makes the file `proof`."""
    command = [sys.executable, "-c", CALLER, address, str(proof)]
    own["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # else Ray calls this machine by another address
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=variables(**own))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The folder and the address of a Ray that runs; a user's variables say that it should be another, and open."""
    folder = (
        tmp_path_factory.mktemp("a-folder-with-a-name-that-no-unix-socket-can-have-in-its-address-" + "x" * 60) / "ray"
    )
    command = [sys.executable, "-c", OWNER, str(folder)]
    theirs = variables(RAY_ADDRESS="127.0.0.1:9", RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="known to many")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=theirs) as owner:
        assert owner.stdout is not None
        yield folder, owner.stdout.readline().strip()
        owner.communicate()
    assert owner.returncode == 0
    assert not folder.exists()


def test_whoever_has_not_the_token_runs_no_task(running: tuple[Path, str], tmp_path: Path) -> None:
    """One that is guessed is none. Of none at all, and of other accounts, tests/test_listeners.py makes sure."""
    refused = call(running[1], tmp_path / "ran", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
    assert refused.returncode != 0
    assert "AuthenticationError" in refused.stderr or "nauthenticated" in refused.stderr
    assert not (tmp_path / "ran").exists()


def test_whoever_has_the_token_runs_a_task(running: tuple[Path, str], tmp_path: Path) -> None:
    """Else the refusals above would say nothing."""
    folder, address = running
    called = call(address, tmp_path / "ran", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(folder / "token"))
    assert called.returncode == 0, called.stderr[-2000:]
    assert (tmp_path / "ran").exists()


def test_the_session_is_this_accounts_alone_though_its_path_is_too_long_for_a_socket(running: tuple[Path, str]) -> None:
    folder, _ = running
    assert len(str(folder)) > 107
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "token").stat().st_mode & 0o777 == 0o600
    assert list(folder.glob("s/session_2*/sockets/raylet"))
