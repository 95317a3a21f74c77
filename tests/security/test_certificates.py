"""Certificates and keys: what is made can be used by TLS, and what is wrong is refused in words."""

import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta

import pytest

from core_training.foundation.errors import InputError
from security.certificates import (
    common_name,
    create_authority,
    create_node_certificate,
    issue_server_certificate,
    load_certificate,
    load_private_key,
)


def test_a_tls_client_that_trusts_the_authority_reaches_the_issued_server(tmp_path):
    authority = create_authority(tmp_path / "ca")
    server = issue_server_certificate(tmp_path / "ca", ["hospital.example"], tmp_path / "server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.certificate, server.key)
    left, right = socket.socketpair()

    def serve():
        with context.wrap_socket(right, server_side=True) as tls:
            tls.sendall(tls.recv(5))

    thread = threading.Thread(target=serve)
    thread.start()
    trust = ssl.create_default_context(cafile=authority.certificate)
    trust.verify_flags |= ssl.VERIFY_X509_STRICT
    with trust.wrap_socket(left, server_hostname="hospital.example") as tls:
        tls.sendall(b"hello")
        assert tls.recv(5) == b"hello"
    thread.join()


def test_the_issued_certificate_is_the_authoritys_and_another_authoritys_is_foreign(tmp_path):
    create_authority(tmp_path / "ours")
    create_authority(tmp_path / "theirs")
    files = issue_server_certificate(tmp_path / "ours", ["example.org"])
    ours, theirs = (load_certificate(tmp_path / name / "ca.crt") for name in ("ours", "theirs"))
    assert common_name(load_certificate(files.certificate, authority=ours)) == "example.org"
    with pytest.raises(InputError, match="foreign"):
        load_certificate(files.certificate, authority=theirs)


def test_an_expired_and_a_not_yet_valid_certificate_are_refused_with_the_date(tmp_path):
    long_ago = datetime.now(UTC) - timedelta(days=20)
    expired = create_node_certificate(tmp_path / "old", "alpha", days=10, now=long_ago)
    with pytest.raises(InputError, match=f"expired on {long_ago + timedelta(days=10):%Y-%m-%d}"):
        load_certificate(expired.certificate)
    early = create_node_certificate(tmp_path / "new", "alpha", now=datetime.now(UTC) + timedelta(days=2))
    with pytest.raises(InputError, match="clock"):
        load_certificate(early.certificate)


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_a_malformed_certificate_is_refused_by_name(tmp_path, content):
    path = tmp_path / "broken.crt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.crt: this is not a PEM certificate"):
        load_certificate(path)


def test_private_keys_are_for_their_owner_alone_and_never_overwritten(tmp_path):
    files = create_authority(tmp_path / "ca")
    assert stat.S_IMODE(files.key.stat().st_mode) == 0o600
    assert stat.S_IMODE(files.key.parent.stat().st_mode) == 0o700
    before = files.key.read_bytes()
    with pytest.raises(InputError, match="there is a key already"):
        create_authority(tmp_path / "ca")
    assert files.key.read_bytes() == before


def test_a_key_that_others_may_read_is_refused(tmp_path):
    files = create_node_certificate(tmp_path, "alpha")
    load_private_key(files.key)
    files.key.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        load_private_key(files.key)


def test_a_certificate_is_no_private_key(tmp_path):
    files = create_node_certificate(tmp_path, "alpha")
    files.certificate.chmod(0o600)
    with pytest.raises(InputError, match="not an unencrypted PEM private key"):
        load_private_key(files.certificate)
