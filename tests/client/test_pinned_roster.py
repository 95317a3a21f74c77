"""A site pins the roster that holds its own key, and lets nobody change it unasked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from client.deployment import init_site
from client.enrolment import load_enrolment
from client.pinned_roster import IDENTITY_KEY, pin_roster, pinned_roster
from client.site_config import load_site_config
from core_training.foundation.errors import InputError
from security.certificates import create_authority
from security.identities import identity_in, roster_digest
from security.signing import create_signing_key, public_key_text


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_authority(tmp_path_factory.mktemp("authority")).certificate


@pytest.fixture
def site(tmp_path: Path, authority: Path) -> Path:
    init_site(tmp_path / "heart", "heart", "127.0.0.1:9092", {}, {}, authority)
    return tmp_path / "heart"


@pytest.fixture
def identities(site: Path, tmp_path: Path) -> dict[str, str]:
    """The site's own, as it hands it over, and two others'."""
    own = identity_in((site / "keys" / "node.pub").read_text().splitlines()[1])
    others = {name: public_key_text(create_signing_key(tmp_path / name)) for name in ("lung", "skin")}
    return {"heart": own, **others}


def written(site: Path, content: Mapping[str, str] | str) -> Path:
    path = site.parent / "roster.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_new_site_has_an_identity_that_is_its_owners_alone(site: Path, identities: dict[str, str]) -> None:
    assert (site / IDENTITY_KEY).stat().st_mode & 0o777 == 0o600
    enrolment = load_enrolment(site, load_site_config(site))
    assert enrolment.identity is not None
    assert public_key_text(enrolment.identity) == identities["heart"]
    assert enrolment.roster == {}


def test_what_is_pinned_is_what_a_run_gets(site: Path, identities: dict[str, str]) -> None:
    pinned = pin_roster(site, written(site, identities))
    enrolment = load_enrolment(site, load_site_config(site))
    assert enrolment.roster == pinned.identities == identities
    assert roster_digest(enrolment.roster) == pinned.digest


def test_a_roster_without_this_site_is_refused(site: Path, identities: dict[str, str]) -> None:
    del identities["heart"]
    with pytest.raises(InputError, match=r"this site, 'heart', is not in it; it has lung, skin.*node\.pub"):
        pin_roster(site, written(site, identities))
    assert pinned_roster(site) is None


def test_a_roster_with_another_key_for_this_site_is_refused(site: Path, identities: dict[str, str]) -> None:
    swapped = {**identities, "heart": identities["lung"], "lung": identities["heart"]}
    with pytest.raises(InputError, match="another identity for 'heart' than this site's own"):
        pin_roster(site, written(site, swapped))
    assert pinned_roster(site) is None


def test_another_roster_takes_the_place_of_the_first_only_when_told_to(
    site: Path, identities: dict[str, str], tmp_path: Path
) -> None:
    first = pin_roster(site, written(site, identities))
    assert pin_roster(site, written(site, identities)) == first
    other = public_key_text(create_signing_key(tmp_path / "other"))
    changed = {"heart": identities["heart"], "lung": other, "liver": identities["skin"]}
    with pytest.raises(InputError, match=r"liver new; skin gone; lung with another key.*--replace"):
        pin_roster(site, written(site, changed))
    assert pinned_roster(site) == first
    pin_roster(site, written(site, changed), replace=True)
    replaced = pinned_roster(site)
    assert replaced is not None
    assert replaced.identities == changed
    assert replaced.digest != first.digest


def test_another_key_for_a_name_that_is_pinned_is_another_roster(
    site: Path, identities: dict[str, str], tmp_path: Path
) -> None:
    first = pin_roster(site, written(site, identities))
    swapped = {**identities, "lung": public_key_text(create_signing_key(tmp_path / "other"))}
    with pytest.raises(InputError, match=r"this one has lung with another key\. If that is right: --replace"):
        pin_roster(site, written(site, swapped))
    assert pinned_roster(site) == first


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "Invalid JSON"),
        ("{}", "at least 1"),
        ('[{"name": "heart"}]', "fedloom server roster"),
        ('{"../heart": "ed25519:' + "A" * 43 + '="}', r"\.\./heart"),
        ('{"heart": "ed25519:AAAA"}', "heart"),
        ('{"heart": "ed25519:' + "A" * 42 + 'B="}', "not a public key"),
        ('{"a": "ed25519:' + "A" * 43 + '=", "b": "ed25519:' + "A" * 43 + '="}', "two sites have the same identity"),
    ],
)
def test_what_is_no_roster_is_refused_by_what_is_wrong(site: Path, content: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        pin_roster(site, written(site, content))


def test_a_roster_out_of_all_proportion_is_not_read(site: Path, identities: dict[str, str]) -> None:
    padded = json.dumps(identities) + " " * (16 << 20)
    with pytest.raises(InputError, match=r"roster\.json: it is larger than 16 MiB"):
        pin_roster(site, written(site, padded))


def test_a_roster_that_is_missing_is_named(site: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.json: the roster cannot be read"):
        pin_roster(site, site / "absent.json")


def test_a_site_without_an_identity_is_told_how_to_get_one(site: Path, identities: dict[str, str]) -> None:
    (site / IDENTITY_KEY).unlink()
    with pytest.raises(InputError, match=r"identity\.key: no such file.*fedloom client init"):
        pin_roster(site, written(site, identities))
    assert load_enrolment(site, load_site_config(site)).identity is None


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o601])
def test_an_identity_that_others_may_read_is_not_used(site: Path, mode: int) -> None:
    (site / IDENTITY_KEY).chmod(mode)
    with pytest.raises(InputError, match="others may read this private key"):
        load_enrolment(site, load_site_config(site))
