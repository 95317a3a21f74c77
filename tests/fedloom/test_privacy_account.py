"""Five plain lines on what a recipe protects: they hold for every topology and codec, and promise no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from core_training.recipe.reading import parse_recipe
from core_training.recipe.schema import Recipe
from fedloom.privacy_account import privacy_of
from tests.fedloom.conftest import Command

LINES = ["who sees what", "a dishonest server", "a dishonest site", "drop-outs", "not protected"]


def recipe(kind: str, aggregation: dict[str, Any] | None = None, minimum: int = 1, **privacy: Any) -> Recipe:
    document: dict[str, Any] = {
        "model": {"name_or_path": "base"},
        "stage": "sft",
        "topology": {"kind": kind, "minimum_sites": minimum},
        "aggregation": aggregation or {},
        "data": {"eval_fraction": 0.1},
        "privacy": privacy,
    }
    if kind != "central":
        document["topology"] |= {"rounds": 3, "local_steps": 2, "round_deadline": 120}
    return parse_recipe(yaml.safe_dump(document))


SECURE = {"secure_aggregation": True}
CODECS: list[dict[str, Any]] = [{}, {"codec": "bf16"}, {"codec": "ring16"}, {"codec": "ring24"}, {"codec": "ring32"}]


@pytest.mark.parametrize("kind", ["central", "federated", "gossip"])
@pytest.mark.parametrize("privacy", [*CODECS, SECURE], ids=str)
def test_there_are_five_lines_for_every_recipe(kind: str, privacy: dict[str, Any]) -> None:
    lines = privacy_of(recipe(kind, **privacy))
    assert list(lines) == LINES
    assert all(text and "\n" not in text for text in lines.values())
    assert "what the final model remembers" in lines["not protected"]


@pytest.mark.parametrize("privacy", CODECS, ids=str)
def test_without_masks_no_codec_is_called_a_protection(privacy: dict[str, Any]) -> None:
    federated, gossip = privacy_of(recipe("federated", **privacy)), privacy_of(recipe("gossip", **privacy))
    assert federated["who sees what"].startswith("the server sees every site's own ")
    assert "single updates, from the server" in federated["not protected"]
    assert "single updates, from the other nodes" in gossip["not protected"]
    assert "privacy.secure_aggregation: true" in gossip["not protected"]
    if privacy:
        assert f"codec {privacy['codec']} makes them smaller and hides nothing" in federated["not protected"]


def test_metropolis_mixing_is_not_advised_what_it_cannot_have() -> None:
    lines = privacy_of(recipe("gossip", {"mixing": "metropolis"}))
    assert "secure_aggregation: true" not in lines["not protected"]
    assert "needs aggregation.mixing group" in lines["not protected"]


def test_a_secure_federated_recipe_says_the_numbers_of_its_own_terms() -> None:
    lines = privacy_of(recipe("federated", minimum=4, **SECURE, clip=0.01))
    assert "sums over at least 3 sites" in lines["who sees what"]
    # more than two thirds: Bonawitz et al. 2017, table for servers that may lie
    assert "more than ⅔ of those that began remain (3 of 3, 5 of 6, 11 of 16), and at least 4" in lines["drop-outs"]
    assert "within 120 s" in lines["drop-outs"]
    assert "up to the clip, 0.01, in a round" in lines["a dishonest site"]


@pytest.mark.parametrize(
    ("threshold", "said"),
    [(0.8, "more than 0.8 of those that began remain (3 of 3, 5 of 6, 13 of 16)"), (7, "when 7 sites remain")],
)
def test_a_threshold_of_ones_own_is_the_one_that_is_said(threshold: float, said: str) -> None:
    lines = privacy_of(recipe("federated", secure_aggregation={"threshold": threshold}))
    assert said in lines["drop-outs"]


@pytest.mark.parametrize(
    ("secure", "league"),
    [
        ({}, "2 sites"),  # of a sum over three sites
        ({"minimum_sites": 10}, "9 sites"),
        ({"minimum_sites": 10, "threshold": 0.67}, "4 sites"),  # 2·7 − 10: who answers both of two lists of survivors
        ({"minimum_sites": 10, "threshold": 0.9}, "9 sites"),
        ({"minimum_sites": 10, "threshold": 0.501}, "1 site"),  # of 11 sites, 6 open a sum
        ({"threshold": 4}, "1 site"),  # of 7
    ],
)
def test_it_says_how_many_sites_a_dishonest_server_needs(secure: dict[str, Any], league: str) -> None:
    lines = privacy_of(recipe("federated", secure_aggregation=secure))
    assert f"with {league} in league it opens another's update" in lines["a dishonest server"]


@pytest.mark.parametrize(("secure", "refused"), [({}, False), ({"minimum_sites": 10}, False), ({"threshold": 4}, True)])
def test_it_says_when_sites_refuse_so_low_a_threshold(secure: dict[str, Any], refused: bool) -> None:
    said = privacy_of(recipe("federated", secure_aggregation=secure))["a dishonest server"]
    assert ("demands minimum_sites 3 for itself refuses cohorts of such a size" in said) == refused


def test_of_one_server_and_two_runs_it_makes_no_secret() -> None:
    said = privacy_of(recipe("federated", **SECURE))["a dishonest server"]
    assert "two runs over sites that differ by one leave that one's update as the difference" in said


@pytest.mark.parametrize("kind", ["federated", "gossip"])
def test_signs_that_one_step_of_adam_leaves_are_said_to_be_unprotected(kind: str) -> None:
    several = recipe(kind, **SECURE)
    one = several.model_copy(update={"topology": several.topology.model_copy(update={"local_steps": 1})})
    sgd = one.model_copy(update={"training": one.training.model_copy(update={"optim": "sgd"})})
    told = ["the sign of each site's changes" in privacy_of(each)["not protected"] for each in (several, one, sgd)]
    assert told == [False, True, False]


def test_a_gossip_group_has_no_server_and_a_minimum() -> None:
    lines = privacy_of(recipe("gossip", minimum=5, **SECURE))
    assert lines["a dishonest server"].startswith("there is none")
    assert "over at least 5 members" in lines["who sees what"]
    assert "forms again in the same round, with new keys and at least 5 members" in lines["drop-outs"]
    assert "of 5 members that of the other 4; in league" in lines["a dishonest site"]
    assert "by accusing others it can make groups as small as that" in lines["a dishonest site"]


@pytest.mark.parametrize(
    ("privacy", "minimum", "taken"),
    [
        ({}, 3, True),
        ({"codec": "bf16"}, 3, True),
        ({"codec": "ring16"}, 2, True),
        ({"codec": "ring16"}, 3, False),
        ({"secure_aggregation": {"minimum_sites": 2}}, 1, True),
        (SECURE, 1, False),
    ],
    ids=str,
)
def test_it_says_where_one_gossip_node_can_put_a_state_in_the_place_of_the_others(
    privacy: dict[str, Any], minimum: int, taken: bool
) -> None:
    said = privacy_of(recipe("gossip", minimum=minimum, **privacy))["a dishonest site"]
    assert ("a state of its own making in the place of theirs" in said) == taken


def test_the_check_prints_them_under_privacy_and_json_has_them(fedloom: Command, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe("federated", **SECURE).to_yaml())
    lines = fedloom("recipe", "check", path).out.splitlines()
    place = lines.index("  privacy")
    said = {line[:22].strip(): line[22:].strip() for line in lines[place + 1 :]}
    assert said == privacy_of(recipe("federated", **SECURE))
    assert json.loads(fedloom("recipe", "check", path, "--json").out)["account"]["privacy"] == said


def test_groups_are_what_is_summed_and_seen_under_the_group_gate() -> None:
    gate: dict[str, Any] = {"rule": "group_gate"}
    lines = privacy_of(recipe("federated", gate, secure_aggregation={"minimum_sites": 2}))
    assert (
        "sums over at least 3 sites, of changes, weights and losses, also of each group's mean"
        in lines["who sees what"]
    )
    assert "it sees the mean of each group, so of 3 sites the sum of the other 2" in lines["a dishonest site"]
    for privacy in ({}, SECURE):
        assert (
            "its group is left out of a round in which"
            in privacy_of(recipe("federated", gate, **privacy))["a dishonest site"]
        )
