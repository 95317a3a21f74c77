"""Rounds of a part of the sites: who is drawn, who is not waited for, and that a run goes on as it would have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core_training.foundation.errors import InputError
from core_training.recipe.learning_rate import learning_rate_of
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.run_folder import RunFolder
from flower_transport.in_process import InProcessGrid
from server.round_loop import run_federation
from server.run_store import RunStore
from strategies.messages import Envelope, Refusal
from strategies.participation import drawn
from tests.failing_sites import federate as federate_trained
from tests.server.arithmetic_sites import ArithmeticSite, federate

MakeRecipe = Callable[..., Recipe]
NAMES = [f"site{number}" for number in range(6)]


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> MakeRecipe:
    def make(rounds: int = 6, weights: str = "equal", **topology: Any) -> Recipe:
        return make_recipe(
            topology={"kind": "federated", "rounds": rounds, "local_steps": 1, "keep_rounds": 9, **topology},
            aggregation={"weights": weights},
        )

    return make


def sites() -> dict[str, ArithmeticSite]:
    return {name: ArithmeticSite(2.0**number, 1) for number, name in enumerate(NAMES)}


def taken(run: Path) -> list[list[str]]:
    """The sites in each round's mean."""
    return [sorted(event.sites) for event in RunFolder(run).events(events.Round)]


@pytest.mark.parametrize("wanted", [2, 0.3])
def test_a_round_is_of_the_sites_that_anybody_can_draw(tmp_path: Path, recipe: MakeRecipe, wanted: float) -> None:
    asked = recipe(sites_per_round=wanted)
    federate(tmp_path / "run", asked, dict(sites()))
    assert taken(tmp_path / "run") == [drawn(asked, number, NAMES) for number in range(1, 7)]
    assert all(len(round_sites) == 2 for round_sites in taken(tmp_path / "run"))
    moves = [np.mean([2.0 ** int(name[-1]) for name in round_sites]) for round_sites in taken(tmp_path / "run")]
    store = RunStore(RunFolder(tmp_path / "run"), 9)
    states = [store.read(number)[1].buffer[0] for number in range(1, 7)]
    np.testing.assert_allclose(states, np.cumsum(moves), rtol=1e-6)


def test_over_many_rounds_every_site_is_drawn_alike(recipe: MakeRecipe) -> None:
    asked = recipe(sites_per_round=2)
    times = Counter(name for number in range(1, 901) for name in drawn(asked, number, NAMES))
    assert sum(times.values()) == 1800
    assert all(abs(times[name] - 300) < 60 for name in NAMES)


def test_a_site_that_is_away_changes_no_other_sites_place(recipe: MakeRecipe) -> None:
    asked = recipe(sites_per_round=2)
    for number in range(1, 50):
        first = drawn(asked, number, NAMES)
        left = drawn(asked, number, [name for name in NAMES if name != first[0]])
        assert first[1] in left


def test_a_server_that_was_killed_goes_on_with_the_same_sites(tmp_path: Path, recipe: MakeRecipe) -> None:
    class Killed(BaseException):
        pass

    def kill(number: int, loss: float | None) -> None:
        if number == 3:
            raise Killed

    whole = federate(tmp_path / "whole", recipe(sites_per_round=2), dict(sites()))
    answers = sites()
    nodes = dict(enumerate(answers, start=1))
    RunFolder(tmp_path / "run").prepare(recipe(sites_per_round=2), resume=False)
    grid = InProcessGrid(lambda order, node: answers[nodes[node]](order), nodes)
    with pytest.raises(Killed):
        run_federation(grid, tmp_path / "run", lambda: nodes, kill, in_process=True)
    resumed = federate(tmp_path / "run", recipe(sites_per_round=2), dict(sites()))
    assert resumed.state_digest == whole.state_digest
    assert taken(tmp_path / "run") == taken(tmp_path / "whole")


def test_a_site_that_fails_is_asked_last_when_the_round_is_tried_again(tmp_path: Path, recipe: MakeRecipe) -> None:
    asked = recipe(sites_per_round=2, minimum_sites=2)
    broken, *_ = drawn(asked, 1, NAMES)

    def refuses(order: Envelope) -> Envelope:
        if order.kind == "train":
            return Refusal(reason="CUDA out of memory").envelope()
        return healthy(order)

    answers: dict[str, Any] = dict(sites())
    healthy = answers[broken]
    summary = federate(tmp_path / "run", asked, {**answers, broken: refuses})
    assert summary.rounds_done == 6
    assert all(broken not in in_mean and len(in_mean) == 2 for in_mean in taken(tmp_path / "run"))


def test_a_rate_that_nobody_named_goes_with_the_sites_of_a_round(make_recipe: MakeRecipe) -> None:
    def rate(**topology: Any) -> float:
        topology = {"kind": "federated", "rounds": 2, "sites": 100, **topology}
        return learning_rate_of(make_recipe(topology=topology, training={"learning_rate": None}), 4096)

    assert rate(sites_per_round=4) == rate(sites_per_round=0.04) == pytest.approx(rate() / 5)


def test_a_round_goes_on_without_those_who_were_asked_beyond(tmp_path: Path, recipe: MakeRecipe) -> None:
    asked = recipe(sites_per_round=2, asked_beyond=0.5)
    federate(tmp_path / "run", asked, dict(sites()))
    spare = RunFolder(tmp_path / "run").events(events.NotAwaited)
    for event, in_mean in zip(spare, taken(tmp_path / "run"), strict=True):
        assert len(in_mean) == 2
        assert sorted([*in_mean, *event.sites]) == drawn(asked, event.round, NAMES)


def test_masks_change_no_bit_of_a_run_that_draws_its_sites(
    tmp_path: Path, make_recipe: MakeRecipe, site_files: list[Path]
) -> None:
    def run(privacy: dict[str, Any], name: str) -> Any:
        wanted = make_recipe(
            simulation={"sites": [str(path) for path in site_files]},
            privacy=privacy,
            topology={"kind": "federated", "rounds": 3, "local_steps": 1, "sites_per_round": 2},
        )
        return federate_trained(wanted, tmp_path / name, lambda *_: None)

    masked = run({"secure_aggregation": {"threshold": 0.55, "minimum_sites": 2}}, "masked")
    plain = run({"codec": "ring16"}, "plain")
    assert masked.state_digest == plain.state_digest
    assert len(set(map(tuple, taken(tmp_path / "masked")))) > 1


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"topology": {"kind": "gossip"}}, r"topology.sites_per_round: it is a server that draws"),
        ({"topology": {"minimum_sites": 3}}, r"sites_per_round: 2 is less than topology.minimum_sites, 3"),
        ({"aggregation": {"rule": "krum"}}, r"sites_per_round: 2 is less than aggregation.krum.poisoned, 5"),
        ({"topology": {"judged_by": ["a"]}}, r"topology.judged_by: a round of drawn sites"),
        ({"topology": {"sites_per_round": None, "asked_beyond": 0.5}}, r"asked_beyond: .* give sites_per_round too"),
        (
            {"topology": {"asked_beyond": 0.5}, "privacy": {"secure_aggregation": {"minimum_sites": 2}}},
            r"topology.asked_beyond: under masks",
        ),
    ],
)
def test_a_participation_that_cannot_be_is_refused_with_the_reason(
    make_recipe: MakeRecipe, sections: Any, said: str
) -> None:
    topology = {"kind": "federated", "rounds": 2, "local_steps": 1, "sites_per_round": 2}
    with pytest.raises(InputError, match=said):
        make_recipe(**{**sections, "topology": {**topology, **sections.get("topology", {})}})
