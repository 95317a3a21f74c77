"""A site whose model is a straight line: real orders and replies, real training by gradient descent, in NumPy.

Also tells a whole federation of such sites what the states must be (`expected_round`), by arithmetic of its own.
"""

import hashlib

import numpy as np

from core_training import __version__
from core_training.foundation.state import Manifest, TrainableState
from core_training.foundation.trainable import DataReport, EvalReport, TrainReport
from core_training.recipe.reading import parse_recipe
from core_training.recipe.sections.privacy import Privacy
from strategies import figures
from strategies.codec_of_round import ring_codec
from strategies.draws import rounding_key
from strategies.messages import (
    EvaluateOrder,
    EvaluateReply,
    InitialStateOrder,
    InitialStateReply,
    JoinOrder,
    JoinReply,
    Refusal,
    TrainOrder,
    Update,
)
from strategies.ring import RingSum
from strategies.ring_scale import first_scale, next_scale


def recipe_of(rounds=4, mixing="group", graph="complete", minimum_sites=1, deadline=600.0, privacy=None, **training):
    recipe = parse_recipe("{model: {name_or_path: line}, stage: sft, data: {train: notes}}")
    topology = recipe.topology.model_copy(
        update={
            "kind": "gossip",
            "rounds": rounds,
            "local_steps": 3,
            "graph": graph,
            "minimum_sites": minimum_sites,
            "round_deadline": deadline,
        }
    )
    return recipe.model_copy(
        update={
            "topology": topology,
            "aggregation": recipe.aggregation.model_copy(update={"mixing": mixing}),
            "training": recipe.training.model_copy(update=training),
            "privacy": Privacy(**privacy or {}),
        }
    )


class LinearSite:
    """Answers orders as a real site does. `width` is the number of weights, `examples` that of records."""

    def __init__(self, seed, examples=20, width=6, shift=0.0):
        rng = np.random.default_rng(seed)
        self.manifest = Manifest.of({"bias": (1,), "weight": (width,)})
        self.inputs = rng.standard_normal((examples, min(width, 32)))
        self.targets = self.inputs @ np.arange(self.inputs.shape[1]) + shift
        self.shift = shift
        self.orders = []

    def initial(self):
        return TrainableState(self.manifest, np.full(self.manifest.size, 0.1, dtype=np.float32))

    def train_from(self, state, steps):
        bias, weights = (value.astype(np.float64).copy() for _, value in state.tensors())
        used = self.inputs.shape[1]
        for _ in range(steps):
            error = self.inputs @ weights[:used] + bias - self.targets
            bias -= 0.1 * error.mean()
            weights[:used] -= 0.1 * self.inputs.T @ error / len(error)
        return TrainableState(self.manifest, np.concatenate([bias, weights]).astype(np.float32))

    def loss(self, state):
        bias, weights = (value.astype(np.float64) for _, value in state.tensors())
        return float(((self.inputs @ weights[: self.inputs.shape[1]] + bias - self.targets) ** 2).sum())

    @property
    def tokens(self):
        return len(self.targets)

    async def ask(self, order):
        return self.handle(order)

    def handle(self, order):
        self.orders.append((order.kind, order.fields.get("round"), hashlib.sha256(order.payload).hexdigest()))
        if order.kind == JoinOrder.kind:
            return self._join(JoinOrder.open(order)).envelope()
        if order.kind == TrainOrder.kind:
            return self._train(TrainOrder.open(order)).envelope()
        if order.kind == EvaluateOrder.kind:
            return self._evaluate(EvaluateOrder.open(order)).envelope()
        if order.kind == InitialStateOrder.kind:
            return InitialStateReply(run_id=order.fields["run_id"], payload=self.initial().to_bytes()).envelope()
        return Refusal(reason=f"unknown order {order.kind}").envelope()

    def _join(self, order):
        recipe = parse_recipe(order.recipe)
        return JoinReply(
            run_id=order.run_id,
            version=__version__,
            recipe_digest=recipe.engine_digest,
            manifest=self.manifest.to_json(),
            initial_digest=self.initial().digest,
            initial_state_digest=self.initial().digest,
            roster_digest=None,
            data=DataReport(self.tokens, self.tokens, 0, 0),
            layout={},
        )

    def _incoming(self, order):
        return TrainableState.from_bytes(order.payload, self.manifest) if order.payload else self.initial()

    def _report(self, state):
        return EvalReport(self.loss(state), self.tokens, self.tokens)

    def _train(self, order):
        before = self._incoming(order)
        after = self.train_from(before, order.steps)
        first, last = self.loss(before) / self.tokens, self.loss(after) / self.tokens
        return Update(
            run_id=order.run_id,
            round=order.round,
            manifest_digest=self.manifest.digest,
            weight=float(self.tokens),
            train=TrainReport(order.steps, first, last, (first + last) / 2, self.tokens, self.tokens, 0.0),
            evaluation=self._report(before) if order.evaluate else None,
            resident_seconds=0.0,
            seconds=0.0,
            payload=after.to_bytes(),
        )

    def _evaluate(self, order):
        return EvaluateReply(run_id=order.run_id, round=order.round, evaluation=self._report(self._incoming(order)))


def three_sites(**options):
    return {
        "alpha": LinearSite(1, examples=11, shift=1.0, **options),
        "beta": LinearSite(2, examples=23, shift=-2.0, **options),
        "gamma": LinearSite(3, examples=5, shift=0.5, **options),
    }


def federated_average(sites, rounds, steps=3):
    """What a server would get: the mean weighted by tokens, round after round, in plain float64 NumPy."""
    state = next(iter(sites.values())).initial()
    for _ in range(rounds):
        trained = [site.train_from(state, steps).buffer.astype(np.float64) for site in sites.values()]
        mean = np.average(trained, axis=0, weights=[site.tokens for site in sites.values()])
        state = TrainableState(state.manifest, mean.astype(np.float32))
    return state


def ring_average(sites, rounds, recipe, members=None, secrets=None):
    """What a server that adds up ring vectors would get.

    `members` are those whose updates come, in each round; all of them, where it is None. `secrets` are what the sites
    round by; their names, where it is None.
    """
    manifest = next(iter(sites.values())).manifest
    state = next(iter(sites.values())).initial()
    scale = first_scale(recipe, manifest)
    for number in range(1, rounds + 1):
        ring = RingSum(ring_codec(recipe, manifest, number, scale, len(sites)))
        codec = ring_codec(recipe, manifest, number, scale, len(sites))
        for name in members[number - 1] if members else sites:
            trained = sites[name].train_from(state, recipe.topology.local_steps)
            key = rounding_key(recipe.training.seed, secrets[name] if secrets else name, number)
            ring.add(codec.encode(trained, state, sites[name].tokens, [0] * figures.COUNT, key))
        if ring.count:
            outcome = ring.result(state)
            state, scale = outcome.state, next_scale(scale, outcome.levels, recipe)
    return state
