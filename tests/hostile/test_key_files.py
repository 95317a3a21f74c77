"""Keys and certificates are files that others hand over: none is read without an end, or waited for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from core_training.foundation.errors import InputError
from flower_transport.credential import read_credential
from security.certificates import last_day, load_certificate, load_private_key
from security.private_files import LARGEST_KEY_FILE, read_private_file
from server.deployment import admit_site, init_federation
from server.federation import Address, Federation
from tests.hostile.test_text import refused

pytestmark = pytest.mark.timeout(60)


def zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def ten_gigabytes(path: Path) -> None:
    path.touch(0o600)
    os.truncate(path, 10 * 2**30)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return init_federation(tmp_path / "federation", Address(host="127.0.0.1", port=9092), [])


@pytest.mark.parametrize("put", [os.mkfifo, zero, ten_gigabytes, os.mkdir])
def test_no_key_or_certificate_is_without_an_end(
    federation: Federation, tmp_path: Path, put: Callable[[Path], object]
) -> None:
    path = tmp_path / "node.pub"
    put(path)
    readers = [
        lambda: admit_site(federation, "x", path),
        *(
            lambda read=read: read(path)
            for read in (load_certificate, last_day, load_private_key, read_private_file, read_credential)
        ),
    ]
    for read in readers:
        said = refused(read, InputError)
        assert f"{path}: " in said
        assert "regular file" in said or "larger than 64 KiB" in said


def test_what_is_longer_than_a_key_is_read_where_it_may_be(tmp_path: Path) -> None:
    path = tmp_path / "record"
    path.touch(0o600)
    path.write_bytes(bytes(LARGEST_KEY_FILE + 1))
    assert "larger than 64 KiB" in refused(lambda: read_private_file(path), InputError)
    assert len(read_private_file(path, LARGEST_KEY_FILE + 1)) == LARGEST_KEY_FILE + 1
