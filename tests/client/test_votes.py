"""A site's vote on the means of a round's groups: of what it votes, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.site import SiteService
from core_training import __version__
from core_training.foundation.state import Manifest, TrainableState
from core_training.foundation.trainable import total
from core_training.recipe.schema import Recipe
from simulations.sites import SitePool
from strategies.bounds import highest_loss
from strategies.group_gate import Ballot
from strategies.messages import Envelope, JoinOrder, JoinReply, Refusal, TrainOrder, Update, Vote, VoteOrder

STEP = 2.0**-16


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], site_files: list[Path]) -> Recipe:
    return make_recipe(
        simulation={"sites": [str(path) for path in site_files]},
        topology={"kind": "federated", "rounds": 2, "local_steps": 1},
        aggregation={"rule": "group_gate"},
    )


class Joined:
    """A site that has joined the run, its manifest, and the states that it begins and ends round 1 with."""

    def __init__(self, service: SiteService, recipe: Recipe) -> None:
        self.service = service
        order = JoinOrder(run_id="r", version=__version__, recipe=recipe.to_yaml())
        self.manifest: Manifest = JoinReply.open(service.handle(order.envelope())).parsed_manifest
        self.engine = service._run._engine  # type: ignore[union-attr]
        self.start = self.engine.initial_state

    def train(self, number: int = 1) -> TrainableState:
        order = TrainOrder(run_id="r", round=number, steps=1, evaluate=True, manifest_digest=self.manifest.digest)
        update = Update.open(self.service.handle(order.envelope()))
        return TrainableState.from_bytes(update.payload, self.manifest)

    def vote(self, *states: TrainableState, **changes: Any) -> Envelope:
        payload = changes.pop("payload", b"".join(state.to_bytes() for state in states))
        fields = {"round": 1, "manifest_digest": self.manifest.digest, "candidates": len(states), "sites": 3, **changes}
        return self.service.handle(VoteOrder(run_id="r", payload=payload, **fields).envelope())


@pytest.fixture
def site(recipe: Recipe, tmp_path: Path) -> Iterator[Joined]:
    pool = SitePool(recipe, tmp_path)
    yield Joined(pool.service(pool.names[0]), pool.recipe)
    pool.close()


def moved(state: TrainableState, by: float) -> TrainableState:
    return replace(state, buffer=state.buffer + np.float32(by))


def test_a_ballot_is_the_evaluation_of_each_state_and_leaves_the_engine_as_it_was(site: Joined) -> None:
    trained = site.train()
    states = [site.start, trained, moved(site.start, 0.1)]
    ballot = Ballot.from_integers(Vote.open(site.vote(*states)).ballot)
    assert site.engine.read_state().digest == trained.digest
    expected = []
    for state in states:
        site.engine.write_state(state)
        expected.append(total(site.engine.evaluate()))
    assert ballot.weight == expected[0].weight > 0
    assert ballot.start == ballot.losses[0]
    assert [loss * STEP for loss in ballot.losses] == pytest.approx([one.loss_sum for one in expected], abs=STEP)


def test_a_state_whose_loss_is_no_number_counts_as_the_worst(site: Joined, recipe: Recipe) -> None:
    trained = site.train()
    broken = moved(site.start, 1e30)
    nan = replace(site.start, buffer=np.full(site.manifest.size, np.nan, dtype=np.float32))
    ballot = Ballot.from_integers(Vote.open(site.vote(site.start, broken, nan)).ballot)
    assert [loss * STEP for loss in ballot.losses[1:]] == [highest_loss(recipe, ballot.weight)] * 2
    assert site.engine.read_state().digest == trained.digest


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another round": ({"round": 2}, "this site has not trained in round 2"),
    "another manifest": ({"manifest_digest": "0" * 64}, "the order's manifest differs"),
    "bytes of no state": ({"payload": b"1234567"}, "bytes are no 2 states of one length"),
    "nothing": ({"payload": b""}, "0 bytes are no 2 states of one length"),
    "more states than groups": ({"candidates": 9}, "9 states to try; a round of this run has 8 groups at most"),
    "masked": ({"masking": "{}"}, "in another form than the recipe says"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_order_to_vote_that_no_honest_server_gives_is_refused(site: Joined, case: str) -> None:
    changes, said = REFUSED[case]
    site.train()
    assert said in Refusal.open(site.vote(site.start, site.start, **changes)).reason


def test_nobody_votes_where_the_rule_asks_for_none(
    make_recipe: Callable[..., Recipe], site_files: list[Path], tmp_path: Path
) -> None:
    plain = make_recipe(
        simulation={"sites": [str(path) for path in site_files]},
        topology={"kind": "federated", "rounds": 2, "local_steps": 1},
    )
    pool = SitePool(plain, tmp_path)
    joined = Joined(pool.service(pool.names[0]), pool.recipe)
    joined.train()
    assert "asks for no vote" in Refusal.open(joined.vote(joined.start)).reason
    pool.close()
