"""Identities in the forms in which people hand them over, and the digest that they compare."""

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from security.identities import identity_in, is_identity, roster_digest, ssh_line, to_read_out
from security.signing import public_key_text

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
ROSTER = {"heart": public_key_text(KEY), "lung": "ed25519:" + base64.b64encode(bytes(range(32))).decode()}

ROSTERS = st.dictionaries(st.text(max_size=3), st.text(max_size=3))


def test_the_openssh_line_and_the_text_in_a_roster_are_one_key():
    assert ssh_line(KEY, "heart").startswith("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5")
    assert ssh_line(KEY, "heart").endswith(" heart")
    assert identity_in(ssh_line(KEY, "heart")) == public_key_text(KEY)
    assert is_identity(public_key_text(KEY))


@pytest.mark.parametrize("line", ["", "ssh-ed25519", "ssh-ed25519 AAAA heart", "heart", "ssh-rsa AAAA\n"])
def test_what_is_no_identity_is_refused(line):
    with pytest.raises(ValueError):  # noqa: PT011 - the caller says what the file should hold
        identity_in(line)


def test_a_key_of_another_kind_is_no_identity():
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    with pytest.raises(ValueError, match="ssh-ed25519"):
        identity_in(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ed25519:",
        public_key_text(KEY).removeprefix("ed25519:"),
        public_key_text(KEY) + "\n",
        "ed25519:" + base64.b64encode(bytes(31)).decode(),
        "ed25519:" + "A" * 42 + "B=",  # the key of 32 zero bytes, were its last two bits not set
    ],
)
def test_a_key_has_one_form_as_text(text):
    assert not is_identity(text)


def test_the_digest_is_that_of_the_content_in_any_order():
    assert roster_digest(ROSTER) == roster_digest(dict(reversed(ROSTER.items())))
    assert to_read_out(roster_digest(ROSTER)).replace(" ", "") == roster_digest(ROSTER)


@given(
    st.dictionaries(st.text(max_size=3), st.text(max_size=3)), st.dictionaries(st.text(max_size=3), st.text(max_size=3))
)
def test_two_rosters_have_one_digest_only_if_they_are_one(one, other):
    assert (roster_digest(one) == roster_digest(other)) == (one == other)
