"""A recipe that protects updates less than a site demands is refused at that site, with both values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from client.enrolment import load_enrolment
from client.site_config import load_site_config
from core_training.foundation.errors import InputError
from core_training.recipe.reading import parse_recipe
from core_training.recipe.schema import Recipe
from tests.site_folder import give_key


def recipe(**privacy: Any) -> Recipe:
    topology = {"kind": "federated", "rounds": 1, "local_steps": 1}
    document = {"model": {"name_or_path": "tiny"}, "stage": "sft", "topology": topology, "privacy": privacy}
    return parse_recipe(yaml.safe_dump(document))


def check(folder: Path, demands: dict[str, Any], asked: Recipe) -> None:
    site = {"name": "heart", "server": "localhost:9092", "secure_aggregation": demands}
    (folder / "site.yaml").write_text(yaml.safe_dump(site))
    give_key(folder)
    load_enrolment(folder, load_site_config(folder)).check(asked)


@pytest.mark.parametrize(
    ("demands", "privacy"),
    [
        ({}, {}),
        ({}, {"codec": "ring16"}),
        ({}, {"secure_aggregation": True}),
        ({"required": True}, {"secure_aggregation": True}),
        ({"minimum_sites": 2}, {"secure_aggregation": {"minimum_sites": 2}}),
        ({"threshold": 0.66}, {"secure_aggregation": True}),
        ({"ring_bits": 24}, {"secure_aggregation": True, "codec": "ring24"}),
        ({"least_clip": 0.001, "most_clip": 1.0}, {"secure_aggregation": True, "clip": 0.01}),
    ],
)
def test_a_recipe_that_meets_the_demands_is_accepted(
    tmp_path: Path, demands: dict[str, Any], privacy: dict[str, Any]
) -> None:
    check(tmp_path, demands, recipe(**privacy))


@pytest.mark.parametrize(
    ("demands", "privacy", "says"),
    [
        ({"required": True}, {}, "privacy.secure_aggregation.*required"),
        ({"required": True}, {"codec": "ring32"}, "privacy.secure_aggregation.*required"),
        ({}, {"secure_aggregation": {"minimum_sites": 2}}, "minimum_sites.*2.*3|minimum_sites.*3.*2"),
        ({"minimum_sites": 5}, {"secure_aggregation": True}, "minimum_sites"),
        ({"threshold": 0.7}, {"secure_aggregation": {"threshold": 0.6}}, "threshold"),
        ({"ring_bits": 24}, {"secure_aggregation": True}, "ring_bits"),
        ({"most_clip": 0.001}, {"secure_aggregation": True, "clip": 0.01}, "clip"),
        ({"least_clip": 0.1}, {"secure_aggregation": True, "clip": 0.01}, "clip"),
    ],
)
def test_a_recipe_that_falls_short_is_refused(
    tmp_path: Path, demands: dict[str, Any], privacy: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        check(tmp_path, demands, recipe(**privacy))


@pytest.mark.parametrize(
    ("most", "aggregation", "privacy", "says"),
    [
        (2.0, {"max_update_norm": 2.0}, {}, None),
        (2.0, {"max_update_norm": 0.5}, {"codec": "ring16"}, None),
        (2.0, {}, {"secure_aggregation": True}, None),
        (None, {}, {}, None),
        (2.0, {"max_update_norm": 2.5}, {}, r"max_update_norm: 2\.5, .* set it to 2 or less"),
        (2.0, {}, {}, r"max_update_norm: none is set, .* set it to 2 or less"),
    ],
)
def test_a_site_says_how_far_another_may_move_the_model(
    tmp_path: Path, most: float | None, aggregation: dict[str, Any], privacy: dict[str, Any], says: str | None
) -> None:
    site = {"name": "heart", "server": "localhost:9092"} | ({"max_update_norm": most} if most else {})
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    give_key(tmp_path)
    document = recipe(**privacy).model_dump(mode="json", exclude_unset=True) | {"aggregation": aggregation}
    enrolment, asked = load_enrolment(tmp_path, load_site_config(tmp_path)), parse_recipe(yaml.safe_dump(document))
    if says is None:
        enrolment.check(asked)
    else:
        with pytest.raises(InputError, match=says):
            enrolment.check(asked)


@pytest.mark.parametrize(
    "demands",
    [{"threshold": 0.4}, {"threshold": 1}, {"minimum_sites": 1}, {"ring_bits": 8}, {"most_clip": 0}, {"clip": 1}],
)
def test_a_malformed_demand_is_named(tmp_path: Path, demands: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"secure_aggregation.{next(iter(demands))}"):
        check(tmp_path, demands, recipe())
