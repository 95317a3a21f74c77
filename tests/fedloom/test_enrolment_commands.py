"""Enrolment as people do it: files change hands, and what each command prints is compared by phone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from security.identities import to_read_out
from tests.fedloom.conftest import Command

NAMES = ("heart", "lung", "skin")


@pytest.fixture
def enrolled(fedloom: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """A federation with three admitted sites, in the folder in which commands are run."""
    monkeypatch.chdir(tmp_path)
    assert fedloom("server", "init").code == 0
    for name in NAMES:
        made = fedloom(
            *("client", "init", "--folder", name, "--name", name, "--server", "127.0.0.1:9092"),
            *("--ca", "federation/keys/ca.crt", "--data", "notes=notes.jsonl", "--model", "tiny=model"),
        )
        assert made.code == 0, made.err
        admitted = fedloom("server", "admit", name, f"{name}/keys/node.pub")
        assert (admitted.code, admitted.out) == (0, f"{name} may join when the server is started.\n")
    return fedloom


def test_every_site_and_the_server_read_out_one_digest(enrolled: Command, tmp_path: Path) -> None:
    written = enrolled("server", "roster")
    assert written.code == 0, written.err
    assert "roster.json names heart, lung, skin." in written.out
    digest = json.loads(enrolled("server", "roster", "--json").out)["digest"]
    assert to_read_out(digest) in written.out
    for name in NAMES:
        told = json.loads(enrolled("client", "pin", "roster.json", "--folder", name, "--json").out)
        assert (told["sites"], told["digest"]) == (list(NAMES), digest)
        assert to_read_out(digest) in enrolled("client", "pin", "roster.json", "--folder", name).out
        assert json.loads(enrolled("client", "status", "--folder", name, "--json").out)["roster"]["digest"] == digest
        assert to_read_out(digest) in enrolled("client", "status", "--folder", name).out


def test_before_a_roster_is_pinned_the_status_says_so(enrolled: Command) -> None:
    assert json.loads(enrolled("client", "status", "--folder", "heart", "--json").out)["roster"] is None
    assert "none pinned" in enrolled("client", "status", "--folder", "heart").out


def test_a_site_that_came_later_makes_another_digest_and_needs_replace(enrolled: Command) -> None:
    enrolled("server", "roster")
    assert enrolled("client", "pin", "roster.json", "--folder", "heart").code == 0
    enrolled(
        *("client", "init", "--folder", "liver", "--name", "liver", "--server", "127.0.0.1:9092"),
        *("--ca", "federation/keys/ca.crt", "--data", "notes=notes.jsonl", "--model", "tiny=model"),
    )
    enrolled("server", "admit", "liver", "liver/keys/node.pub")
    enrolled("server", "roster")
    refused = enrolled("client", "pin", "roster.json", "--folder", "heart")
    assert (refused.code, refused.out) == (2, "")
    assert "this one has liver new" in refused.err
    assert "--replace" in refused.err
    assert enrolled("client", "pin", "roster.json", "--folder", "heart", "--replace").code == 0


def test_a_server_that_puts_its_own_key_in_a_sites_place_is_found_out_by_that_site(enrolled: Command) -> None:
    enrolled("server", "roster")
    roster = json.loads(Path("roster.json").read_text())
    Path("forged.json").write_text(json.dumps({**roster, "lung": "ed25519:" + "A" * 43 + "="}))
    found = enrolled("client", "pin", "forged.json", "--folder", "lung")
    assert found.code == 2
    assert "another identity for 'lung' than this site's own" in found.err


def test_a_site_that_hands_over_one_line_is_told_what_it_lacks(enrolled: Command) -> None:
    Path("heart.pub").write_text(Path("heart/keys/node.pub").read_text().splitlines()[0] + "\n")
    enrolled("server", "init", "--folder", "other")
    admitted = enrolled("server", "admit", "heart", "heart.pub", "--folder", "other")
    assert admitted.code == 0
    assert "takes no part in runs with secure aggregation" in admitted.out
    refused = enrolled("server", "roster", "--folder", "other", "--out", "other.json")
    assert (refused.code, Path("other.json").exists()) == (2, False)


def test_the_servers_own_list_of_sites_is_no_roster_to_pin(enrolled: Command) -> None:
    refused = enrolled("client", "pin", "federation/roster.json", "--folder", "heart")
    assert refused.code == 2
    assert "fedloom server roster" in refused.err


@pytest.mark.parametrize(
    "command", [["server", "roster"], ["client", "pin"], ["server", "admit"], ["server", "submit"]]
)
def test_help_teaches_what_secure_aggregation_needs(fedloom: Command, command: list[str]) -> None:
    assert "secure aggregation" in " ".join(fedloom(*command, "--help").out.replace("│", " ").split()).replace("_", " ")
