"""The roster and a node's folder: one changed byte, another founder, a wrong certificate, and people's slips."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from core_training.foundation.errors import InputError
from p2p.deployment import make_roster
from p2p.node_folder import KEYS, init_node, load_identity, pin_founder, trusted_founder
from p2p.roster import Member, SignedRoster, read_member, read_roster
from security.certificates import create_node_certificate


def node(folder, name, port, **options):
    return init_node(folder / name, name, f"127.0.0.1:{port}", {"notes": ["notes.jsonl"]}, {"line": "line"}, **options)


@pytest.fixture
def signed(tmp_path):
    """A roster of two nodes: its file and the founder's public key."""
    entries = [node(tmp_path, "beta", 9102), node(tmp_path, "alpha", 9101)]
    _, founder = make_roster(entries, tmp_path / "founder", tmp_path / "roster.json")
    return tmp_path / "roster.json", founder


def test_a_roster_opens_with_its_founders_key_in_the_order_of_names(signed):
    path, founder = signed
    assert read_roster(path, founder).names == ("alpha", "beta")


def test_a_roster_with_any_byte_of_its_content_changed_is_refused(signed):
    path, founder = signed
    sound = path.read_bytes()
    start, end = sound.index(b'"members"'), sound.index(b'"signature"')
    for place in range(start, end, 97):
        changed = bytearray(sound)
        changed[place] ^= 0x01
        path.write_bytes(changed)
        if json_of(bytes(changed)) == json_of(sound):
            continue
        with pytest.raises(InputError):
            read_roster(path, founder)


def json_of(data):
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_a_changed_address_is_told_from_the_signature(signed):
    path, founder = signed
    path.write_text(path.read_text().replace("127.0.0.1:9101", "127.0.0.1:9109"))
    with pytest.raises(InputError, match="signature does not match"):
        read_roster(path, founder)


def test_another_founders_roster_is_refused(signed, tmp_path):
    path, founder = signed
    _, other = make_roster([tmp_path / "alpha" / "node.json"], tmp_path / "usurper", path)
    assert other != founder
    with pytest.raises(InputError, match="another founder"):
        read_roster(path, founder)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"\xff\xfe", b'{"document": {}, "signature": "AAAA"}', b"[" * 9999]
)
def test_a_file_that_is_no_roster_is_refused(signed, content):
    path, founder = signed
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"roster\.json"):
        read_roster(path, founder)


def test_the_founder_is_pinned_at_the_first_start(signed, tmp_path):
    _, founder = signed
    folder = tmp_path / "alpha"
    with pytest.raises(InputError, match="--founder is needed"):
        trusted_founder(folder, None)
    assert trusted_founder(folder, founder) == founder
    pin_founder(folder, founder)
    assert trusted_founder(folder, None) == founder
    with pytest.raises(InputError, match="this node trusts"):
        trusted_founder(folder, "ed25519:" + "A" * 43 + "=")


def test_nodes_that_share_a_name_or_an_address_make_no_roster(tmp_path):
    entries = [node(tmp_path / "one", "alpha", 9101), node(tmp_path / "two", "alpha", 9102)]
    with pytest.raises(InputError, match="same name: alpha"):
        make_roster(entries, tmp_path / "founder", tmp_path / "roster.json")
    entries = [node(tmp_path / "three", "beta", 9101), entries[0]]
    with pytest.raises(InputError, match="same address"):
        make_roster(entries, tmp_path / "founder", tmp_path / "roster.json")


def test_an_entry_with_anothers_certificate_or_an_expired_one_is_refused(tmp_path):
    entry = node(tmp_path, "alpha", 9101)
    other = create_node_certificate(tmp_path / "other", "beta").certificate.read_text()
    expired = create_node_certificate(tmp_path / "old", "alpha", days=1, now=datetime.now(UTC) - timedelta(days=9))
    document = json.loads(entry.read_text())
    for certificate, reason in [
        (other, "made out to 'beta'"),
        (expired.certificate.read_text(), "expired"),
        ("x", "PEM"),
    ]:
        entry.write_text(json.dumps({**document, "certificate": certificate}))
        with pytest.raises(InputError, match=reason):
            read_member(entry)


def test_a_node_whose_own_certificate_is_expired_foreign_or_without_its_key_does_not_start(signed, tmp_path):
    path, founder = signed
    roster = read_roster(path, founder)
    folder = tmp_path / "alpha"
    assert load_identity(folder, "alpha", roster).name == "alpha"

    def with_keys_of(made):
        for name in ("node.crt", "node.key"):
            (folder / KEYS / name).unlink()
            (made / name).rename(folder / KEYS / name)

    create_node_certificate(tmp_path / "new", "alpha")
    with_keys_of(tmp_path / "new")
    with pytest.raises(InputError, match="the roster has another certificate for 'alpha'"):
        load_identity(folder, "alpha", roster)
    create_node_certificate(tmp_path / "old", "alpha", days=1, now=datetime.now(UTC) - timedelta(days=9))
    with_keys_of(tmp_path / "old")
    with pytest.raises(InputError, match="expired"):
        load_identity(folder, "alpha", roster)
    create_node_certificate(tmp_path / "third", "alpha")
    (tmp_path / "third" / "node.crt").rename(folder / KEYS / "node.crt")
    with pytest.raises(InputError, match="does not belong to"):
        load_identity(folder, "alpha", roster)


def test_what_is_handed_over_holds_no_secret_and_the_folder_is_private(tmp_path):
    entry = node(tmp_path, "alpha", 9101, address="hospital.example:443")
    key = (tmp_path / "alpha" / KEYS / "node.key").read_text()
    assert "PRIVATE" in key
    assert "PRIVATE" not in entry.read_text()
    assert json.loads(entry.read_text())["address"] == "hospital.example:443"
    assert (tmp_path / "alpha").stat().st_mode & 0o777 == 0o700
    with pytest.raises(InputError, match="there is a site or a node already"):
        node(tmp_path, "alpha", 9101)


@pytest.mark.parametrize("listen", ["9101", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:99999", "http://x:1", "a b:1"])
def test_a_malformed_address_is_refused(tmp_path, listen):
    with pytest.raises(InputError, match="HOST:PORT"):
        init_node(tmp_path / "alpha", "alpha", listen, {"notes": ["x"]}, {"line": "x"})


def test_a_roster_without_members_is_none():
    with pytest.raises(ValueError, match="at least 1"):
        SignedRoster(members=[])
    with pytest.raises(ValueError, match="address"):
        Member(name="alpha", address="nowhere", certificate="")
