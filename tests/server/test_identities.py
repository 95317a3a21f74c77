"""The identities of the admitted sites: taken from node.pub, handed out as a roster, asked for by a secure run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from client.deployment import init_site
from client.pinned_roster import IDENTITY_KEY
from core_training.foundation.errors import InputError
from security.identities import roster_digest
from security.signing import load_signing_key, public_key_text
from server.deployment import admit_site, init_federation, submit_run
from server.federation import Address, Federation

RECIPE = """
model: {name_or_path: tiny}
stage: sft
data: {train: notes}
topology: {kind: federated, rounds: 1, local_steps: 1}
"""


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return init_federation(tmp_path / "federation", Address(), [])


def new_site(federation: Federation, name: str) -> Path:
    """Make a site beside the federation; returns its node.pub."""
    folder = federation.folder.parent / name
    return init_site(folder, name, str(federation.address), {}, {}, federation.keys / "ca.crt")


def identity_of(node_pub: Path) -> str:
    return public_key_text(load_signing_key(node_pub.parents[1] / IDENTITY_KEY))


def cut_to_one_line(node_pub: Path) -> str:
    """What a site of an earlier version hands over; returns the whole."""
    whole = node_pub.read_text()
    node_pub.write_text(whole.splitlines()[0] + "\n")
    return whole


def test_an_admitted_site_has_the_identity_that_it_made(federation: Federation) -> None:
    keys = {name: new_site(federation, name) for name in ("b", "a")}
    for name, key in keys.items():
        admit_site(federation, name, key)
    assert list(federation.identities().items()) == [("a", identity_of(keys["a"])), ("b", identity_of(keys["b"]))]
    assert all("ssh-ed25519" not in site.public_key for site in federation.sites())


def test_a_file_of_one_line_is_admitted_without_an_identity(federation: Federation) -> None:
    key = new_site(federation, "a")
    cut_to_one_line(key)
    assert admit_site(federation, "a", key).identity is None
    assert federation.identities() == {}


def test_a_site_without_an_identity_brings_it_later_and_stays_who_it_is(federation: Federation) -> None:
    key = new_site(federation, "a")
    whole = cut_to_one_line(key)
    admit_site(federation, "a", key)
    federation.set_node_id("a", 7)
    with pytest.raises(InputError, match="a site named 'a' is admitted already"):
        admit_site(federation, "a", key)
    key.write_text(whole)
    admit_site(federation, "a", key)
    (site,) = federation.sites()
    assert (site.node_id, site.identity) == (7, identity_of(key))
    with pytest.raises(InputError, match="a site named 'a' is admitted already"):
        admit_site(federation, "a", key)


def test_nobody_brings_an_identity_for_a_site_with_another_key(federation: Federation) -> None:
    key, other = new_site(federation, "a"), new_site(federation, "b")
    cut_to_one_line(key)
    admit_site(federation, "a", key)
    with pytest.raises(InputError, match="a site named 'a' is admitted already"):
        admit_site(federation, "a", other)
    assert federation.identities() == {}


def test_an_identity_is_admitted_once(federation: Federation) -> None:
    key, other = new_site(federation, "a"), new_site(federation, "b")
    admit_site(federation, "a", key)
    other.write_text(other.read_text().splitlines()[0] + "\n" + key.read_text().splitlines()[1] + "\n")
    with pytest.raises(InputError, match="this identity is admitted already, as site 'a'"):
        admit_site(federation, "b", other)


@pytest.mark.parametrize("second", ["ssh-ed25519 AAAA", "garbage", "FIRST", "SECOND\nSECOND"])
def test_a_malformed_second_line_is_not_admitted(federation: Federation, second: str) -> None:
    key = new_site(federation, "a")
    lines = key.read_text().splitlines()
    key.write_text("\n".join([lines[0], second.replace("FIRST", lines[0]).replace("SECOND", lines[1])]))
    with pytest.raises(InputError, match="these are not a site's public keys"):
        admit_site(federation, "a", key)
    assert federation.sites() == []


def test_the_roster_is_written_anywhere_but_over_the_servers_own_list(federation: Federation, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no admitted site has an identity yet"):
        federation.hand_out_roster(tmp_path / "roster.json")
    key = new_site(federation, "a")
    admit_site(federation, "a", key)
    federation.hand_out_roster(tmp_path / "roster.json")
    first = json.loads((tmp_path / "roster.json").read_text())
    assert first == {"a": identity_of(key)}
    with pytest.raises(InputError, match="the server's own list of sites"):
        federation.hand_out_roster(federation.folder / "roster.json")
    assert [site.name for site in federation.sites()] == ["a"]
    admit_site(federation, "b", new_site(federation, "b"))
    second = federation.hand_out_roster(tmp_path / "roster.json")
    # A run goes on with the roster that its sites have pinned, whichever that is.
    assert federation.roster_of(roster_digest(first)) == first
    assert federation.roster_of(roster_digest(second)) == second
    with pytest.raises(InputError, match="did not write"):
        federation.roster_of("0" * 64)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("true", r"needs 3 sites \(minimum_sites\), and 2 of the admitted ones have an identity \(a, b\)"),
        ("{minimum_sites: 4}", r"needs 4 sites \(minimum_sites\)"),
        ("{threshold: 5}", r"needs 5 sites \(threshold\)"),
        ("{minimum_sites: 2}", None),
        ("{threshold: 2, minimum_sites: 2}", None),
    ],
)
def test_a_secure_run_without_enough_identities_is_refused_at_once(
    federation: Federation, tmp_path: Path, asked: str, says: str | None
) -> None:
    for name in ("a", "b", "c"):
        key = new_site(federation, name)
        if name == "c":
            cut_to_one_line(key)
        admit_site(federation, name, key)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(InputError, match="fedloom server roster" if says is None else "the recipe needs"):
        submit_run(federation, tmp_path / "recipe.yaml", [f"privacy.secure_aggregation={asked}"])
    federation.hand_out_roster(tmp_path / "roster.json")
    # With enough of them, what is amiss here is that no server runs.
    expected = (
        f"privacy.secure_aggregation: the recipe {says}.*both lines of their node.pub: c" if says else "not running"
    )
    with pytest.raises(InputError, match=expected):
        submit_run(federation, tmp_path / "recipe.yaml", [f"privacy.secure_aggregation={asked}"])
    with pytest.raises(InputError, match="not running"):
        submit_run(federation, tmp_path / "recipe.yaml", [])


def test_the_topologys_own_minimum_counts_too(federation: Federation, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        admit_site(federation, name, new_site(federation, name))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    overrides = ["privacy.secure_aggregation=true", "topology.minimum_sites=4"]
    with pytest.raises(InputError, match=r"needs 4 sites \(topology\.minimum_sites\)"):
        submit_run(federation, tmp_path / "recipe.yaml", overrides)
