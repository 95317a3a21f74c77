"""A server that lies gets no site's update: its orders go to real sites, whatever an honest server would check."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from client.enrolment import Enrolment
from client.site import SiteService
from core_training import __version__
from core_training.engine.dataset import load_dataset
from core_training.engine.engine import Engine
from core_training.foundation.state import TrainableState
from core_training.models.base_model import BaseModel
from core_training.recipe.reading import parse_recipe
from core_training.recipe.schema import Recipe
from core_training.runs.checkpoints import read_checkpoint
from core_training.stages.base import load_stage
from security.secure_aggregation.masks import RingVector
from security.secure_aggregation.messages import Signed, read
from security.secure_aggregation.server import ServerBatch, ServerRound
from security.secure_aggregation.terms import Minimums, terms_of
from simulations.enrolment import enrolments_of, identities_of
from strategies.codec_of_round import ring_codec
from strategies.messages import (
    Envelope,
    EvaluateOrder,
    JoinOrder,
    JoinReply,
    MaskedUpdate,
    Message,
    Refusal,
    RingTerms,
    SecureOrder,
    SecureReply,
    TrainOrder,
    Update,
)
from strategies.ring import Outcome
from strategies.ring_scale import Scale, first_scale, largest_change

pytestmark = pytest.mark.slow
MakeRecipe = Callable[..., Recipe]
RUN = "r"
OTHERS, VICTIM = ["s0", "s1"], "s2"
SITES = [*OTHERS, VICTIM]
FEDERATED = {"kind": "federated", "rounds": 3, "local_steps": 2}
SECURE = {"secure_aggregation": True}
NO_MASKING = "this is no order to mask"
"""Lets a site train, and then refuse to send."""


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> Recipe:
    return make_recipe(topology=FEDERATED, privacy=SECURE)


def with_(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """The recipe with some settings of some sections changed."""
    document = recipe.model_dump(exclude_unset=True, mode="json")
    for name, settings in sections.items():
        document[name] = {**document.get(name, {}), **settings}
    return parse_recipe(yaml.safe_dump(document))


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    """One model for all sites of this file."""
    document = {
        "model": {"name_or_path": str(tiny_model)},
        "stage": "sft",
        "tuning": {"mode": "lora", "lora": {"r": 4, "lora_alpha": 8}},
    }
    return BaseModel(parse_recipe(yaml.safe_dump(document)))


class LyingServer:
    """Three sites that take part in nothing without secure aggregation, and a server that may ask them anything."""

    def __init__(self, base: BaseModel, files: list[Path], folder: Path) -> None:
        self._base = base
        self._files = dict(zip(SITES, files, strict=True))
        self._folder = folder
        demands = {"minimums": Minimums(), "required": True}
        self._enrolments = {site: replace(own, **demands) for site, own in enrolments_of(SITES, "federated").items()}
        self._services: dict[str, SiteService] = {}
        self.manifest = base.manifest
        for site in SITES:
            self.restart(site)

    def restart(self, site: str, **enrolment: Any) -> None:
        """The site's process ends and begins again, maybe with other demands or another secret."""
        if site in self._services:
            self._services[site].close()
        own: Enrolment = replace(self._enrolments[site], **enrolment)
        self._services[site] = SiteService(site, self._opener(site), self._folder / site, own)

    def close(self) -> None:
        for service in self._services.values():
            service.close()

    def send(self, site: str, order: Message) -> Envelope:
        return self._services[site].handle(order.envelope())

    def refusal(self, site: str, order: Message) -> str:
        """Why the site does not do it; a test fails where it does."""
        answer = self.send(site, order)
        assert answer.kind == Refusal.kind, f"{site} did as it was told: {answer.kind}"
        return Refusal.open(answer).reason

    def join(self, recipe: Recipe, sites: list[str] = SITES, run: str = RUN) -> JoinReply:
        order = JoinOrder(run_id=run, version=__version__, recipe=recipe.to_yaml())
        return [JoinReply.open(self.send(site, order)) for site in sites][-1]

    def batch(self, recipe: Recipe, number: int = 1) -> ServerBatch:
        """Masks that the three sites have in common, for four rounds."""
        batch = ServerBatch(RUN, number, 4, identities_of(SITES), terms_of(recipe, largest_change(recipe)))
        for site in SITES:
            batch.add_keys(site, self.secure(site, "keys", batch.keys_order()))
        for site, order in batch.shares_orders().items():
            batch.add_shares(site, self.secure(site, "shares", order))
        return batch

    def secure(self, site: str, step: Any, document: bytes) -> bytes:
        order = SecureOrder(run_id=RUN, step=step, payload=document)
        return SecureReply.open(self.send(site, order)).payload

    def order(self, recipe: Recipe, number: int = 1, scale: Scale | None = None, **fields: Any) -> TrainOrder:
        """An order to train that says nothing of use about masking."""
        ring = RingTerms(scale=scale or first_scale(recipe, self.manifest), sites=len(SITES), masking=NO_MASKING)
        honest = {
            "run_id": RUN,
            "round": number,
            "steps": recipe.topology.local_steps,
            "evaluate": False,
            "manifest_digest": self.manifest.digest,
            "ring": ring,
        }
        return TrainOrder(**{**honest, **fields})

    def round(self, recipe: Recipe, batch: ServerBatch, order: TrainOrder, initial: str) -> CredulousRound:
        """The round's slot of `batch`, when all were told this; `initial` is the digest of what the run began with."""
        context = order.context(self.initial_state().digest, recipe.to_yaml(), initial)
        length = self.codec(recipe, order).length
        return CredulousRound(batch, order.round - 1, order.round, context, length, SITES)

    def codec(self, recipe: Recipe, order: TrainOrder) -> Any:
        assert order.ring is not None
        return ring_codec(recipe, self.manifest, order.round, order.ring.scale, order.ring.sites)

    def masked(self, recipe: Recipe, site: str, order: TrainOrder, spent: ServerRound) -> MaskedUpdate:
        """The site's update under its masks, added to the sum."""
        update = MaskedUpdate.open(self.send(site, masking(order, spent.mask_order(site))))
        spent.add(site, update.statement, self.codec(recipe, order).from_bytes(update.payload))
        return update

    def sum_of(self, recipe: Recipe, order: TrainOrder, spent: ServerRound) -> Outcome:
        """What the masked updates come to when all sites help to open their sum."""
        for site, document in spent.unmask_orders().items():
            spent.add_unmasked(site, self.secure(site, "unmask", document))
        outcome: Outcome = self.codec(recipe, order).decode(spent.finish(), len(SITES), self.initial_state())
        return outcome

    def initial_state(self) -> TrainableState:
        return self._base.initial_state

    def trained(self, site: str, number: int) -> tuple[TrainableState, int]:
        """State and weight that a site has kept of a round; only the site's own machine can look there."""
        state, notes = read_checkpoint(self.checkpoints(site) / f"round-{number:06d}", self.manifest)
        return state, notes["train"]["weight"]

    def checkpoints(self, site: str) -> Path:
        return self._folder / site / RUN / "checkpoints"

    def _opener(self, site: str) -> Callable[[Recipe], Engine]:
        def open_engine(recipe: Recipe) -> Engine:
            own = with_(recipe, data={"train": [str(self._files[site])]})
            stage = load_stage(own, self._base)
            return Engine(stage, load_dataset(own, stage))

        return open_engine


class CredulousRound(ServerRound):
    """A round that takes any masked vector: what a lying server does not check, the sites must."""

    def add(self, site: str, statement: str, vector: RingVector) -> None:
        self._sum += vector
        self._masked[site] = read(Signed, statement, "statement", 0, 1)


def unmask(document: bytes) -> SecureOrder:
    return SecureOrder(run_id=RUN, step="unmask", payload=document)


def masking(order: TrainOrder, document: str) -> TrainOrder:
    assert order.ring is not None
    return order.model_copy(update={"ring": order.ring.model_copy(update={"masking": document})})


@pytest.fixture
def server(base: BaseModel, site_files: list[Path], tmp_path: Path) -> Iterator[LyingServer]:
    server = LyingServer(base, site_files, tmp_path)
    yield server
    server.close()


def test_what_these_tests_ask_of_sites_is_what_they_do_for_an_honest_server(
    server: LyingServer, recipe: Recipe
) -> None:
    initial = server.join(recipe).initial_digest
    order = server.order(recipe)
    spent = server.round(recipe, server.batch(recipe), order, initial)
    for site in SITES:
        server.masked(recipe, site, order, spent)
    outcome = server.sum_of(recipe, order, spent)
    kept = [server.trained(site, 1) for site in SITES]
    mean = np.average([state.buffer for state, _ in kept], axis=0, weights=[weight for _, weight in kept])
    np.testing.assert_allclose(outcome.state.buffer, mean, atol=2e-4)


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("kind", ["gossip", "central"])
def test_a_site_takes_part_in_runs_of_its_own_topology_only(
    server: LyingServer, make_recipe: MakeRecipe, kind: str, required: bool
) -> None:
    """In gossip a site hands its own node the trained state as it is."""
    server.restart(VICTIM, required=required)
    topology = {"kind": kind} if kind == "central" else {**FEDERATED, "kind": kind}
    other = make_recipe(topology=topology, privacy={} if kind == "central" else SECURE)
    join = JoinOrder(run_id=RUN, version=__version__, recipe=other.to_yaml())
    assert f"takes part in federated runs, not in {kind}" in server.refusal(VICTIM, join)
    order = TrainOrder(run_id=RUN, round=1, steps=2, evaluate=False, manifest_digest=server.manifest.digest)
    assert "has not joined" in server.refusal(VICTIM, order)


def test_sites_that_were_given_different_recipes_open_no_sum(server: LyingServer, recipe: Recipe) -> None:
    """With a learning rate of 0 at the others, the sum would be the victim's update."""
    honest = with_(recipe, privacy={"clip": largest_change(recipe)})
    initial = server.join(honest, [VICTIM]).initial_digest
    server.join(with_(honest, training={"learning_rate": 0.0}), OTHERS)
    order = server.order(honest)
    spent = server.round(honest, server.batch(honest), order, initial)
    for site in SITES:
        server.masked(honest, site, order, spent)
    for site, document in spent.unmask_orders().items():
        assert "'context' is not what it must be" in server.refusal(site, unmask(document))


@pytest.mark.parametrize("field", ["run_id", "round", "steps", "evaluate", "manifest_digest", "void_rounds", "ring"])
def test_the_context_of_a_round_holds_all_that_an_order_says(recipe: Recipe, base: BaseModel, field: str) -> None:
    assert {*TrainOrder.model_fields} == {
        "payload",  # its digest is the start's
        "taken_in",  # each site's own
        *("run_id", "round", "steps", "evaluate", "manifest_digest", "void_rounds", "ring"),
    }
    scale = first_scale(recipe, base.manifest)
    order = TrainOrder(
        run_id=RUN,
        round=1,
        steps=2,
        evaluate=False,
        manifest_digest="1" * 64,
        ring=RingTerms(scale=scale, sites=3),
    )
    coarser = scale.model_copy(update={"weight_cap": 2 * scale.weight_cap})
    others = {
        "run_id": ["other"],
        "round": [2],
        "steps": [3],
        "evaluate": [True],
        "manifest_digest": ["2" * 64],
        "void_rounds": [1],
        "ring": [RingTerms(scale=scale, sites=4), RingTerms(scale=coarser, sites=3)],
    }
    told = order.context("start", "recipe", "initial")
    for other in others[field]:
        assert order.model_copy(update={field: other}).context("start", "recipe", "initial") != told
    for other in (("other", "recipe", "initial"), ("start", "other", "initial"), ("start", "recipe", "other")):
        assert order.context(*other) != told
    assert masking(order, "for one site").context("start", "recipe", "initial") == told
    assert order.model_copy(update={"taken_in": 1}).context("start", "recipe", "initial") == told


@pytest.mark.parametrize("change", [{"training": {"learning_rate": 0.0}}, {"privacy": {"secure_aggregation": False}}])
def test_a_run_that_has_begun_goes_on_with_its_recipe(
    server: LyingServer, recipe: Recipe, change: dict[str, Any]
) -> None:
    """Without secure aggregation in it, what was masked could be asked for again as it is."""
    for site in SITES:
        server.restart(site, required=False)
    server.join(recipe)
    server.batch(recipe)
    other = with_(recipe, **change)
    join = JoinOrder(run_id=RUN, version=__version__, recipe=other.to_yaml())
    assert "joined it with another recipe" in server.refusal(VICTIM, join)
    server.restart(VICTIM, required=False)
    assert "joined it with another recipe" in server.refusal(VICTIM, join)
    assert server.join(recipe).run_id == RUN


@pytest.mark.parametrize("where", ["everywhere", "in one tensor", "by the recipe's clip"])
def test_a_scale_that_leaves_signs_alone_is_refused_and_nothing_is_told_of_the_values(
    server: LyingServer, recipe: Recipe, where: str
) -> None:
    """A sum of a few sites' signs times unequal weights is different for each pattern of them."""
    tensors = len(server.manifest.tensors)
    exponents = {
        "everywhere": [40] * tensors,
        "in one tensor": [40] + [0] * (tensors - 1),
        "by the recipe's clip": [0] * tensors,
    }
    if where == "by the recipe's clip":
        recipe = with_(recipe, privacy={"clip": 1e-9})
    cap = first_scale(recipe, server.manifest).weight_cap
    order = server.order(recipe, scale=Scale(exponents=exponents[where], weight_cap=cap))
    initial = server.join(recipe).initial_digest
    spent = server.round(recipe, server.batch(recipe), order, initial)
    reason = server.refusal(VICTIM, masking(order, spent.mask_order(VICTIM)))
    assert "would cut too many values" in reason
    assert not re.search(r"\d", reason)


@pytest.mark.parametrize("room", [4, 2**14, 100_000])
def test_room_in_the_ring_for_more_sites_than_the_roster_has_is_refused(
    server: LyingServer, recipe: Recipe, room: int
) -> None:
    """With two bits a value, a 1 in the sum would be one site's, and so would many a bit of weights and losses."""
    server.join(recipe, [VICTIM])
    ring = RingTerms(scale=first_scale(recipe, server.manifest), sites=room, masking=NO_MASKING)
    reason = server.refusal(VICTIM, server.order(recipe, ring=ring))
    assert f"room for {room} sites; this site's roster has 3" in reason
    assert not list(server.checkpoints(VICTIM).glob("*"))


def test_a_scale_of_weights_that_no_site_has_is_refused(server: LyingServer, recipe: Recipe) -> None:
    """All changes would be far below a step of it, and a 1 in the sum would be one site's."""
    server.join(recipe, [VICTIM])
    scale = first_scale(recipe, server.manifest)
    order = server.order(recipe, scale=scale.model_copy(update={"weight_cap": 2**25}))
    assert "weight_cap 33554432: no site has so much in a round" in server.refusal(VICTIM, order)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"steps": 1}, "round 1 with 1 steps; the recipe has 3 rounds with 2"),
        ({"steps": 5}, "round 1 with 5 steps"),
        ({"number": 4}, "round 4 with 2 steps; the recipe has 3 rounds"),
        ({"number": 5, "void_rounds": 1}, "round 5 with 2 steps; the recipe has 3 rounds"),
        ({"number": 1, "void_rounds": 1}, "round 1 with 2 steps; the recipe has 3 rounds"),
        ({"number": 8, "void_rounds": 6}, "6 void rounds; a run of 3 rounds ends at 6"),
        ({"ring": None}, "does not say on what scale"),
        ({"masking": None}, "would have the update leave unmasked"),
    ],
)
def test_an_order_that_is_not_the_recipes_is_refused_before_a_step_is_taken(
    server: LyingServer, recipe: Recipe, fields: dict[str, Any], says: str
) -> None:
    server.join(recipe, [VICTIM])
    if "masking" in fields:
        fields = {"ring": RingTerms(scale=first_scale(recipe, server.manifest), sites=3)}
    assert says in server.refusal(VICTIM, server.order(recipe, **fields))
    assert not list(server.checkpoints(VICTIM).glob("*"))


@pytest.mark.parametrize("astray", ["by a later round", "by a state that diverges"])
def test_a_site_that_was_led_astray_trains_a_round_as_if_it_had_not_been(
    server: LyingServer, recipe: Recipe, astray: str
) -> None:
    """Sites further down the schedule than the victim would move less, and the sum would be the victim's update."""
    server.join(recipe, [VICTIM])
    server.refusal(VICTIM, server.order(recipe))
    honest, _ = server.trained(VICTIM, 1)
    server.join(recipe, [VICTIM], run="other")  # so that the run is opened again
    for checkpoint in server.checkpoints(VICTIM).iterdir():
        checkpoint.rename(server.checkpoints(VICTIM).parent / checkpoint.name)
    payload = b""
    if astray == "by a state that diverges":
        start = server.initial_state()
        payload = TrainableState(start.manifest, np.full_like(start.buffer, 1e38)).to_bytes()
    reason = server.refusal(VICTIM, server.order(recipe, number=3, payload=payload))
    assert ("no longer finite" in reason) == bool(payload)
    server.refusal(VICTIM, server.order(recipe))
    assert server.trained(VICTIM, 1)[0].digest == honest.digest


def test_a_round_that_was_answered_is_answered_with_the_same_bytes_or_not_at_all(
    server: LyingServer, recipe: Recipe
) -> None:
    initial = server.join(recipe).initial_digest
    order = server.order(recipe)
    spent = server.round(recipe, server.batch(recipe), order, initial)
    first = server.masked(recipe, VICTIM, order, spent)
    order = masking(order, spent.mask_order(VICTIM))
    again = MaskedUpdate.open(server.send(VICTIM, order))
    assert (again.payload, again.statement) == (first.payload, first.statement)
    assert order.ring is not None
    start = server.initial_state()
    ring = order.ring
    coarser = ring.scale.model_copy(update={"weight_cap": ring.scale.weight_cap // 2})
    others: list[dict[str, Any]] = [
        {"evaluate": True},
        {"ring": ring.model_copy(update={"sites": 2})},
        {"ring": ring.model_copy(update={"scale": coarser})},
        {"payload": TrainableState(start.manifest, start.buffer + np.float32(1e-4)).to_bytes()},
    ]
    for fields in others:
        assert "masked another vector" in server.refusal(VICTIM, order.model_copy(update=fields))
    batch = server.batch(recipe, number=2)
    spent = server.round(recipe, batch, order, initial)
    assert "masked round 1, and none twice" in server.refusal(VICTIM, masking(order, spent.mask_order(VICTIM)))


def test_a_site_evaluates_one_result_a_run(server: LyingServer, recipe: Recipe) -> None:
    server.join(recipe, [VICTIM])
    state = server.initial_state()
    other = TrainableState(state.manifest, state.buffer + np.float32(1e-4))

    def result(state: TrainableState, final: bool = True) -> EvaluateOrder:
        digest = state.manifest.digest
        return EvaluateOrder(run_id=RUN, round=3, final=final, manifest_digest=digest, payload=state.to_bytes())

    assert "of the result alone" in server.refusal(VICTIM, result(state, final=False))
    assert server.send(VICTIM, result(state)).kind == "evaluated"
    for _ in range(2):
        assert "another state was evaluated" in server.refusal(VICTIM, result(other))
        assert server.send(VICTIM, result(state)).kind == "evaluated"
        server.restart(VICTIM)


@pytest.mark.parametrize("codec", ["ring16", "bf16"])
def test_how_a_site_rounds_is_its_own_secret(
    server: LyingServer, make_recipe: MakeRecipe, codec: str, tmp_path: Path
) -> None:
    """Whoever knew it could tell, where a value of the sum is 1, which site it is of."""
    recipe = make_recipe(topology=FEDERATED, privacy={"codec": codec})
    payloads = []
    for secret in ("one", "one", "another"):
        server.restart(VICTIM, required=False, rounding_secret=secret)
        server.join(recipe, [VICTIM])
        order = server.order(recipe) if codec == "ring16" else server.order(recipe, ring=None)
        payloads.append(Update.open(server.send(VICTIM, order)).payload)
    assert payloads[0] == payloads[1] != payloads[2]
