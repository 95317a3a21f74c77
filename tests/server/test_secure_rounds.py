"""Masks of a whole run: when they are set up anew, and for whom."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core_training.foundation.errors import RunError
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder, Summary
from flower_transport.in_process import InProcessGrid
from server.deployment import init_federation
from server.federation import Address
from strategies.messages import Envelope
from tests import failing_sites, tiny
from tests.failing_sites import federate

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Recipe:
    """Five sites, of which four are needed to open a sum, and three at least."""
    files = [str(tiny.write_jsonl(tmp_path / f"s{n}.jsonl", tiny.questions(n, 8))) for n in range(5)]
    return make_recipe(
        simulation={"sites": files},
        privacy={"secure_aggregation": True},
        topology={"kind": "federated", "rounds": 3, "local_steps": 1},
    )


def test_when_too_few_of_a_set_up_are_left_those_who_are_there_set_masks_up_among_themselves(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: set[int] = set()
    ids = InProcessGrid.nodes
    monkeypatch.setattr(InProcessGrid, "nodes", lambda grid: [node for node in ids(grid) if node not in gone])

    def leave_after_round_1(site: str, order: Envelope) -> None:
        if order.fields.get("step") == "unmask":
            gone.update((1, 2))

    summary = federate(recipe, tmp_path / "run", leave_after_round_1)
    assert (summary.rounds, summary.void_rounds) == (3, 0)
    set_up = [(event["round"], event["sites"]) for event in RunFolder(tmp_path / "run").lines("masks_set_up")]
    assert set_up == [(1, ["s0", "s1", "s2", "s3", "s4"]), (2, ["s2", "s3", "s4"])]


def test_after_a_void_round_masks_are_set_up_anew(recipe: Recipe, tmp_path: Path) -> None:
    """Else a site that has lost its files would make one round after the other void."""
    asked: list[str] = []

    def lost(site: str, order: Envelope) -> str | None:
        if order.fields.get("step") != "unmask" or len(asked) == 2:
            return None
        asked.append(site)
        return "before"

    summary = federate(recipe, tmp_path / "run", lost)
    assert summary.void_rounds == 1
    assert [event["round"] for event in RunFolder(tmp_path / "run").lines("masks_set_up")] == [1, 2]


def test_a_roster_that_the_server_did_not_hand_out_turns_a_site_away_with_the_remedy(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it might be the first, and the others' roster would be the wrong one."""
    run, federation = failing_sites.run_federation, init_federation(tmp_path / "federation", Address(port=9), [])

    def among_strangers(*given: Any, roster_of: object, **named: Any) -> Summary:
        return run(*given, roster_of=federation.roster_of, **named)

    monkeypatch.setattr(failing_sites, "run_federation", among_strangers)
    with pytest.raises(RunError, match=r"did not write here; .* `fedloom client pin --replace roster\.json`"):
        federate(recipe, tmp_path / "run", lambda site, order: None)


@pytest.mark.parametrize("step", ["keys", "train"])
def test_a_site_that_missed_a_set_up_or_a_round_is_waited_for_with_new_masks_in_the_next(
    recipe: Recipe, tmp_path: Path, step: str
) -> None:
    missed: list[str] = []

    def once(site: str, order: Envelope) -> str | None:
        if site == "s1" and step in (order.kind, order.fields.get("step")) and not missed:
            missed.append(site)
            return "before"
        return None

    summary = federate(recipe, tmp_path / "run", once)
    assert summary.sites["s1"].rounds == 2
    assert [event["round"] for event in RunFolder(tmp_path / "run").lines("masks_set_up")] == [1, 2]


def test_a_site_that_misses_every_round_has_masks_set_up_for_its_sake_ever_more_seldom(
    recipe: Recipe, tmp_path: Path
) -> None:
    topology = recipe.topology.model_copy(update={"rounds": 8})
    summary = federate(
        recipe.model_copy(update={"topology": topology}),
        tmp_path / "run",
        lambda site, order: "before" if (site, order.kind) == ("s1", "train") else None,
    )
    assert (summary.rounds, summary.void_rounds) == (8, 0)
    assert [event["round"] for event in RunFolder(tmp_path / "run").lines("masks_set_up")] == [1, 2, 4, 8]


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it and tidy up."""


def test_no_two_set_ups_of_a_run_have_the_same_number_though_the_server_is_killed_in_one(
    recipe: Recipe, tmp_path: Path
) -> None:
    numbers: list[int] = []
    kills = 2

    def fault(site: str, order: Envelope) -> None:
        nonlocal kills
        step = order.fields.get("step")
        if step == "keys" and site == "s0":
            numbers.append(json.loads(bytes(order.payload))["number"])
        if step == "shares" and kills:
            kills -= 1
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            federate(recipe, tmp_path / "run", fault)
    federate(recipe, tmp_path / "run", fault)
    assert len(numbers) == len(set(numbers)) == 3
    assert numbers == sorted(numbers)
