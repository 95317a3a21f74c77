"""The group gate in whole runs of a tiny model: poisoned sites, masks that change no bit, and a killed server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.learning.poisoned_sites import ATTACKS, poisoned
from core_training.foundation.errors import InputError, RunError
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.run_folder import RunFolder, Summary
from security.secure_aggregation.terms import Minimums, terms_of
from simulations import enrolment, simulate
from strategies.group_gate import drawn_groups
from strategies.messages import Envelope
from tests import tiny
from tests.failing_sites import Fault, federate

pytestmark = pytest.mark.slow
MakeRecipe = Callable[..., Recipe]
MASKED = {"secure_aggregation": True}
PLAIN = {"codec": "ring16"}


def nobody(site: str, order: Envelope) -> None:
    return None


@pytest.fixture(scope="module")
def many_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Twelve sites of one kind of questions."""
    folder, records = tmp_path_factory.mktemp("sites"), tiny.questions(0, 12 * 12)
    return [str(tiny.write_jsonl(folder / f"s{number:02}.jsonl", records[number::12])) for number in range(12)]


@pytest.fixture
def recipe(make_recipe: MakeRecipe, many_files: list[str]) -> MakeRecipe:
    def make(
        sites: int, rule: str = "group_gate", groups: int | None = None, rounds: int = 2, **sections: Any
    ) -> Recipe:
        return make_recipe(
            simulation={"sites": many_files[:sites]},
            topology={"kind": "federated", "rounds": rounds, "local_steps": 3},
            aggregation={"rule": rule, "group_gate": {"groups": groups}},
            data={"eval_fraction": 0.3},
            **sections,
        )

    return make


def names(sites: int) -> list[str]:
    return [f"s{number:02}" for number in range(sites)]


def tried(run: Path) -> list[Tried]:
    """Each round's groups; their rises as they are told."""
    return [Tried(event.groups) for event in RunFolder(run).events(events.GroupsTried)]


@dataclass(frozen=True)
class Tried:
    groups: Mapping[str, Mapping[str, Any]]

    @property
    def kept(self) -> list[list[str]]:
        return [group["sites"] for group in self.groups.values() if group["kept"]]


@pytest.mark.parametrize(
    ("sites", "bad", "groups", "attack"),
    [(9, ["s03"], 3, "times -10"), (12, ["s03", "s08"], 6, "sign flip")],
)
def test_poisoned_sites_ruin_the_mean_and_not_the_gate(
    recipe: MakeRecipe, tmp_path: Path, sites: int, bad: list[str], groups: int, attack: str
) -> None:
    clean = federate(recipe(sites, "fedavg"), tmp_path / "clean", nobody)
    with poisoned(bad, ATTACKS[attack]):
        mean = federate(recipe(sites, "fedavg"), tmp_path / "mean", nobody)
        gate = federate(recipe(sites, groups=groups), tmp_path / "gate", nobody)
    assert mean.eval_loss is not None
    assert gate.eval_loss is not None
    assert clean.eval_loss is not None
    assert gate.eval_loss - clean.eval_loss < 0.3 * (mean.eval_loss - clean.eval_loss)
    in_mean = Counter(site for event in tried(tmp_path / "gate") for group in event.kept for site in group)
    assert sum(in_mean[site] for site in bad) == 0
    assert set(in_mean) == set(names(sites)) - set(bad)
    assert {name: site.rounds for name, site in gate.sites.items()} == {name: in_mean[name] for name in names(sites)}


def test_masks_change_no_bit_of_the_result_nor_of_the_choice(recipe: MakeRecipe, tmp_path: Path) -> None:
    with poisoned(["s03"], ATTACKS["sign flip"]):
        masked = federate(recipe(12, privacy=MASKED), tmp_path / "masked", nobody)
        plain = federate(recipe(12, privacy=PLAIN, groups=4), tmp_path / "plain", nobody)
    assert masked.state_digest == plain.state_digest
    assert tried(tmp_path / "masked") == tried(tmp_path / "plain")
    assert any("s03" in event.sites for event in RunFolder(tmp_path / "masked").events(events.GroupLeftOut))
    assert masked.void_rounds == 0


def killed_at(kind: str, site: str, round_number: int) -> Fault:
    """A fault that ends the server once, at this order to this site."""
    kills = [1]

    def fault(name: str, order: Envelope) -> None:
        if kills and (name, order.kind, order.fields.get("round")) == (site, kind, round_number):
            kills.clear()
            raise Killed

    return fault


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it and tidy up."""


def killed_and_resumed(recipe: Recipe, folder: Path, fault: Fault) -> Summary:
    with pytest.raises(Killed):
        federate(recipe, folder, fault)
    return federate(recipe, folder, fault)


def test_a_server_that_is_killed_between_masked_sums_and_the_vote_loses_the_round_and_no_more(
    recipe: MakeRecipe, tmp_path: Path
) -> None:
    """The sums of that round were opened, and no site helps to open any other."""
    wanted = recipe(9, privacy=MASKED)
    summary = killed_and_resumed(wanted, tmp_path / "run", killed_at("vote", "s04", 1))
    assert (summary.rounds, summary.void_rounds) == (2, 1)
    folder = RunFolder(tmp_path / "run")
    assert [event.round for event in folder.events(events.RoundVoid)] == [1]
    assert [event.round for event in folder.events(events.MasksSetUp)] == [1, 2, 3]
    assert summary.eval_loss is not None
    assert summary.eval_loss_initial is not None
    assert summary.eval_loss < summary.eval_loss_initial


def test_a_server_that_is_killed_before_the_sums_asks_the_same_groups_again_and_gets_the_same_bytes(
    recipe: MakeRecipe, tmp_path: Path
) -> None:
    wanted = recipe(9, privacy=MASKED)
    whole = federate(wanted, tmp_path / "whole", nobody)
    resumed = killed_and_resumed(wanted, tmp_path / "run", killed_at("train", "s08", 2))
    assert (resumed.state_digest, resumed.void_rounds) == (whole.state_digest, 0)
    assert tried(tmp_path / "run") == tried(tmp_path / "whole")
    assert [event.round for event in RunFolder(tmp_path / "run").events(events.MasksSetUp)] == [1, 2]


def test_who_drops_out_costs_its_group_the_round_its_masks_or_its_voice_and_the_others_go_on(
    recipe: MakeRecipe, tmp_path: Path
) -> None:
    lost_at = {1: "keys", 2: "train", 3: "vote"}
    seen = [1]

    def fault(site: str, order: Envelope) -> str | None:
        seen[0] = max(seen[0], order.fields.get("round", 0) + (order.kind == "vote"))
        number = min(order.fields.get("round", seen[0]), 3)
        step = order.fields.get("step", order.kind)
        return "before" if site == "s05" and step == lost_at[number] else None

    wanted = recipe(12, privacy=MASKED, rounds=3)
    summary = federate(wanted, tmp_path / "run", fault)
    assert (summary.rounds, summary.void_rounds) == (3, 0)
    left_out = [event for event in RunFolder(tmp_path / "run").events(events.GroupLeftOut) if event.rise is None]
    own = [next(group for group in drawn_groups(wanted, number, names(12)) if "s05" in group) for number in (1, 2, 3)]
    assert [(event.round, event.sites) for event in left_out] == [(1, own[0]), (2, own[1])]
    assert "its masks cannot be set up: 2 of 2 sites are there; it takes 3" in left_out[0].reason
    assert "it has no sum" in left_out[1].reason
    voted = [[group["voted"] for group in one.groups.values()] for one in tried(tmp_path / "run")]
    assert voted[:2] == [[True] * 3] * 2
    assert voted[2].count(False) == 1


def test_too_few_sites_for_groups_under_masks_are_told_what_to_do(recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"9 sites at least, and there are 8; let more .* ring \(privacy\.codec\) without"
    ):
        simulate(recipe(8, privacy=MASKED), RunFolder(tmp_path / "run"))


def test_a_site_takes_part_in_no_smaller_group_than_it_demands(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment, "_NO_DEMANDS", Minimums(minimum_sites=4))
    with pytest.raises(RunError, match="minimum_sites 3: this site takes part from 4 up"):
        federate(recipe(9, privacy=MASKED), tmp_path / "three", nobody)
    wanted = recipe(12, privacy={"secure_aggregation": {"minimum_sites": 4}}, rounds=1)
    federate(wanted, tmp_path / "four", nobody)
    assert [len(group["sites"]) for group in tried(tmp_path / "four")[0].groups.values()] == [4, 4, 4]
    assert terms_of(recipe(9, privacy={"secure_aggregation": {"minimum_sites": 2}}), 1.0).minimum_sites == 3
