"""What a site's update weighs in the mean, as `aggregation.weights` says: alike for server, rings, masks and gossip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core_training.foundation.errors import InputError, ProtocolError
from core_training.foundation.state import TrainableState
from core_training.foundation.trainable import DataReport, TrainReport
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from p2p.inbox import Inbox
from server.run_store import RunStore
from simulations import simulate
from strategies.codec_of_round import ring_codec
from strategies.messages import Envelope, JoinReply, TrainOrder, Update
from strategies.ring_scale import Scale, first_scale, next_scale
from strategies.weights import most_weight_in_mean, weight_in_mean
from tests import tiny
from tests.failing_sites import federate as federate_trained
from tests.server.arithmetic_sites import MANIFEST, ArithmeticSite, events, federate

MakeRecipe = Callable[..., Recipe]
MASKED = {"secure_aggregation": {"threshold": 0.55, "minimum_sites": 2}}
NUMBERS, UNITS, RECORDS = (1.0, 4.0), (10, 20), (9, 100)
EXPECTED = {
    "loss_units": (1 * 10 + 4 * 20) / 30,
    "records": (1 * 9 + 4 * 100) / 109,
    "sqrt_records": (1 * 3 + 4 * 10) / 13,
    "equal": (1 + 4) / 2,
    "given": (1 * 3 + 4 * 1) / 4,
}


class WeighedSite(ArithmeticSite):
    """Announces `records`; its update has the weight that the recipe says, and `more` of it."""

    def __init__(self, recipe: Recipe, number: float, units: int, records: int, name: str, more: float = 0.0) -> None:
        super().__init__(number, units)
        self.recipe, self.records, self.name, self.more = recipe, records, name, more

    def __call__(self, order: Envelope) -> Envelope:
        reply = super().__call__(order)
        if order.kind == "join":
            data = DataReport(self.records, 2, 0, 0)
            return JoinReply.open(reply).model_copy(update={"data": data}).envelope()
        if order.kind == "train":
            assert TrainOrder.open(order).ring is None
            update = Update.open(reply)
            weight = weight_in_mean(self.recipe, update.train, self.records, self.name) + self.more
            return update.model_copy(update={"weight": weight}).envelope()
        return reply


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> MakeRecipe:
    def make(weights: str, kind: str = "federated", **sections: Any) -> Recipe:
        topology = {"kind": kind, "rounds": 2, "local_steps": 1}
        first = "s0" if "simulation" in sections else "a"
        given = {"site_weights": {first: 3, "s2": 5}} if weights == "given" else {}
        return make_recipe(topology=topology, aggregation={"weights": weights, **given}, **sections)

    return make


def final_state(run: Path) -> TrainableState:
    committed = RunStore(RunFolder(run)).latest()
    assert committed is not None
    return committed[1]


@pytest.mark.parametrize("weights", EXPECTED)
def test_a_mean_is_weighted_as_the_recipe_says(tmp_path: Path, recipe: MakeRecipe, weights: str) -> None:
    wanted = recipe(weights)
    kinds = zip("ab", NUMBERS, UNITS, RECORDS, strict=True)
    sites = {name: WeighedSite(wanted, number, units, records, name) for name, number, units, records in kinds}
    federate(tmp_path / "run", wanted, dict(sites))
    np.testing.assert_allclose(final_state(tmp_path / "run").buffer, 2 * EXPECTED[weights], rtol=1e-6)


@pytest.mark.parametrize("weights", EXPECTED)
def test_a_site_weighs_no_more_than_it_announced(tmp_path: Path, recipe: MakeRecipe, weights: str) -> None:
    wanted = recipe(weights)
    honest, greedy = WeighedSite(wanted, 1.0, 10, 9, "honest"), WeighedSite(wanted, 9.0, 10, 9, "greedy", more=1.0)
    federate(tmp_path / "run", wanted, {"honest": honest, "greedy": greedy})
    np.testing.assert_array_equal(final_state(tmp_path / "run").buffer, 2.0)
    quarantined = events(tmp_path / "run", "quarantined")
    assert [event["site"] for event in quarantined] == ["greedy", "greedy"]
    assert "is not that of its report" in quarantined[0]["reason"]


@pytest.mark.parametrize("weights", EXPECTED)
def test_who_learnt_from_nothing_weighs_nothing(recipe: MakeRecipe, weights: str) -> None:
    report = TrainReport(1, 1.0, 1.0, 1.0, 7, 7, 0.0)
    assert weight_in_mean(recipe(weights), report, 16, "b") == {
        "loss_units": 7.0, "records": 16.0, "sqrt_records": 4.0, "equal": 1.0, "given": 1.0
    }[weights]  # fmt: skip
    assert weight_in_mean(recipe(weights), replace(report, weight=0), 16, "b") == 0


@pytest.fixture
def unequal(tmp_path: Path) -> list[str]:
    """The files of three sites with 8, 12 and 24 records."""
    sizes = (8, 12, 24)
    return [
        str(tiny.write_jsonl(tmp_path / f"s{number}.jsonl", tiny.questions(number, size)))
        for number, size in enumerate(sizes)
    ]


def nobody(site: str, order: Envelope) -> None:
    return None


@pytest.mark.parametrize("weights", ["equal", "given"])
def test_weights_that_are_known_are_alike_in_the_clear_in_a_ring_masked_and_in_gossip(
    tmp_path: Path, recipe: MakeRecipe, unequal: list[str], weights: str
) -> None:
    """Real sites of unequal size. A ring rounds; masks change no bit of it, nor does a group of peers."""
    settings: dict[str, Any] = {"simulation": {"sites": unequal}}

    def run(name: str, weights: str = weights, kind: str = "federated", **privacy: Any) -> Any:
        wanted = recipe(weights, kind, privacy=privacy, **settings)
        if kind == "federated":
            return federate_trained(wanted, tmp_path / name, nobody)
        return simulate(wanted, RunFolder(tmp_path / name))

    clear = run("clear")
    assert run("gossip", kind="gossip").state_digest == clear.state_digest
    assert run("units", "loss_units").state_digest != clear.state_digest
    in_ring = run("ring", codec="ring24")
    if weights == "equal":
        assert run("masked", codec="ring24", **MASKED).state_digest == in_ring.state_digest
    assert run("group", kind="gossip", codec="ring24").rounds == 2
    apart = np.abs(final_state(tmp_path / "units").buffer - final_state(tmp_path / "clear").buffer).max()
    near = np.abs(final_state(tmp_path / "ring").buffer - final_state(tmp_path / "clear").buffer).max()
    assert near < 1e-4 < apart


def test_the_scale_of_equal_weights_has_all_bits_and_no_other_cap(recipe: MakeRecipe) -> None:
    given = recipe("given", privacy={"codec": "ring16"})
    assert (most_weight_in_mean(given, 5), first_scale(given, MANIFEST).weight_cap) == (5, 8)
    equal = recipe("equal", privacy={"codec": "ring16"})
    assert most_weight_in_mean(equal, 5) == 1
    scale = first_scale(equal, MANIFEST)
    assert scale.weight_cap == 1
    levels = [[0, 0, 3, 0, 0, 0], [0, 0, 3, 0, 0, 0], [0, 3, 0, 0, 0, 0]]
    assert next_scale(scale, levels, equal).weight_cap == 1
    coarse = Scale(exponents=scale.exponents, weight_cap=2)
    with pytest.raises(ProtocolError, match="weight_cap 2: no site has so much in a round; 1 is enough"):
        ring_codec(equal, MANIFEST, 1, coarse, 3)


def test_a_peer_that_claims_more_than_an_equal_weight_is_refused(recipe: MakeRecipe) -> None:
    from p2p.messages import Hello, UpdateHeader

    inbox = Inbox("run", MANIFEST, recipe("equal", "gossip"), codec=None)  # type: ignore[arg-type]
    header = UpdateHeader(
        run_id="run", round=1, sender="a", manifest_digest=MANIFEST.digest, weight=1.0, degree=1, size=40,
        sha256="0" * 64, wants_to_stop=False,
    )  # fmt: skip
    nothing = Hello.model_construct(train_examples=0, processes=1)
    inbox.check_header("a", header, nothing)
    with pytest.raises(ProtocolError, match=r"weight 1\.5; that of a round lies in 1 … 1"):
        inbox.check_header("a", header.model_copy(update={"weight": 1.5}), nothing)
    given = Inbox("run", MANIFEST, recipe("given", "gossip"), codec=None)  # type: ignore[arg-type]
    given.check_header("a", header.model_copy(update={"weight": 3.0}), nothing)
    with pytest.raises(ProtocolError, match=r"weight 5.0; the recipe gives it 3"):
        given.check_header("a", header.model_copy(update={"weight": 5.0}), nothing)


@pytest.mark.parametrize("weights", ["records", "sqrt_records"])
@pytest.mark.parametrize(
    ("kind", "privacy", "said"),
    [
        ("gossip", {}, "is more than a gossip node knows of its peers"),
        ("federated", {"codec": "ring16"}, "has no most that the recipe knows, and ring16"),
        ("federated", {"secure_aggregation": True}, "has no most that the recipe knows, and ring16"),
    ],
)
def test_records_weigh_where_a_server_can_hold_them_against_what_was_announced(
    recipe: MakeRecipe, weights: str, kind: str, privacy: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=f"aggregation.weights: {weights} {said}"):
        recipe(weights, kind, privacy=privacy)


def test_a_site_that_holds_nearly_all_records_is_told_once(tmp_path: Path, recipe: MakeRecipe) -> None:
    wanted = recipe("equal")
    sites = {name: WeighedSite(wanted, 1.0, 10, records, name) for name, records in (("a", 95), ("b", 5))}
    federate(tmp_path / "run", wanted, dict(sites))
    (told,) = events(tmp_path / "run", "one_site_holds")
    assert (told["site"], told["share"]) == ("a", 0.95)
    even = {name: WeighedSite(wanted, 1.0, 10, records, name) for name, records in (("a", 85), ("b", 15))}
    federate(tmp_path / "even", wanted, dict(even))
    assert events(tmp_path / "even", "one_site_holds") == []
