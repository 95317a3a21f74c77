"""Federations in which one site sends ten times the others' change, the other way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core_training.foundation.errors import InputError, RunError
from core_training.parts.aggregation_rules import AGGREGATION_RULES
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from server.run_store import RunStore
from tests.server.arithmetic_sites import ArithmeticSite, federate

MakeRecipe = Callable[..., Recipe]
RULES = [name for name, part in AGGREGATION_RULES.items() if str(part.target).startswith("strategies.robust_rules.")]
ROUNDS = 3


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> MakeRecipe:
    def make(rule: str, kind: str = "federated", **sections: Any) -> Recipe:
        topology = {"kind": kind, "rounds": ROUNDS, "local_steps": 1}
        aggregation = {"rule": rule, **sections.pop("aggregation", {})}
        return make_recipe(topology=topology, aggregation=aggregation, **sections)

    return make


def moved(run: Path) -> float:
    """How far every value has come in a round, on average."""
    committed = RunStore(RunFolder(run)).latest()
    assert committed is not None
    return float(np.mean(committed[1].buffer)) / ROUNDS


HONEST = {"a": 0.9, "b": 1.0, "c": 1.0, "d": 1.1}


@pytest.mark.parametrize("outer", ["none", "momentum"])
@pytest.mark.parametrize("rule", RULES)
def test_a_poisoned_site_is_survived(tmp_path: Path, recipe: MakeRecipe, rule: str, outer: str) -> None:
    sites = {name: ArithmeticSite(number, 10) for name, number in {**HONEST, "mallory": -10.0}.items()}
    federate(tmp_path / "run", recipe(rule, aggregation={"outer": {"step": outer}}), dict(sites))
    least = 0.5 if rule == "norm_clipped_mean" else 0.85  # what mallory moves is as long as an honest change
    # Under momentum 0.5 three rounds of one length go 1, 1.5 and 1.75 times as far.
    further = 4.25 / 3 if outer == "momentum" else 1
    assert least < moved(tmp_path / "run") / further < 1.15
    federate(tmp_path / "mean", recipe("fedavg"), dict(sites))
    assert moved(tmp_path / "mean") < -1


def test_a_round_with_fewer_updates_than_krum_takes_does_not_count(tmp_path: Path, recipe: MakeRecipe) -> None:
    sites = {name: ArithmeticSite(number, 10) for name, number in HONEST.items()}
    wanted = recipe("krum")
    wanted = wanted.model_copy(update={"topology": wanted.topology.model_copy(update={"round_deadline": 0.5})})
    assert (wanted.needed_sites, wanted.fewest_sites["aggregation.krum.poisoned"]) == (5, 5)
    assert recipe("multi_krum", aggregation={"multi_krum": {"poisoned": 3}}).needed_sites == 9
    assert recipe("median").needed_sites == 1
    with pytest.raises(RunError, match=r"4 of at least 5 sites were ready .*aggregation\.krum\.poisoned"):
        federate(tmp_path / "run", wanted, dict(sites))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("kind", "privacy", "said"),
    [
        ("federated", {"codec": "ring16"}, "ring16 carries sums, and rule '{rule}' needs each site's state by itself"),
        ("federated", {"secure_aggregation": True}, "choose rule 'fedavg', or codec fp32 or bf16 without secure"),
        ("gossip", {}, "aggregation.rule: '{rule}' is a server's, .*; choose rule 'fedavg'"),
        ("gossip", {"codec": "ring16"}, "aggregation.rule: '{rule}' is a server's, .*; choose rule 'fedavg'"),
    ],
)
def test_a_rule_that_needs_each_update_is_refused_where_nobody_sees_it(
    recipe: MakeRecipe, rule: str, kind: str, privacy: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said.format(rule=rule)):
        recipe(rule, kind, privacy=privacy)
