"""A build of an extension that was killed is not waited for; one that goes on is left alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from core_training.distributed import extension_builds

CALLS = "from core_training.distributed.extension_builds import clear_killed_builds as clear; clear(); "


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(extension_builds, "_mark", None)
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    return lock


def test_the_mark_of_a_killed_build_is_removed(lock: Path) -> None:
    build = f"import pathlib, time; pathlib.Path({str(lock)!r}).touch(); print('builds', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", CALLS + build], stdout=subprocess.PIPE) as builder:
        assert builder.stdout is not None
        builder.stdout.readline()
        subprocess.run([sys.executable, "-c", CALLS], check=True)
        assert lock.exists(), "it is being built"
        builder.kill()
    extension_builds.clear_killed_builds()
    assert not lock.exists()
