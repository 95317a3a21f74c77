"""The server's peak memory for 64 masked updates in a round, against that for 4: they are added as they come, not kept.

`streaming_memory` under secure aggregation: the real round loop, and sites whose updates of ten million parameters are
made up, written in the 16-bit ring and masked by the real protocol, in the same process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.federation.streaming_memory import FEW, MANIFEST, MANY, RECIPE, TARGET, AllAtOnceGrid, answer
from benchmarks.figure import Figure
from benchmarks.fresh_process import in_fresh_process
from benchmarks.places import Places
from core_training.foundation.state import TrainableState
from core_training.foundation.trainable import TrainReport
from core_training.recipe.reading import parse_recipe
from core_training.runs.run_folder import RunFolder
from security.identities import roster_digest
from security.secure_aggregation.site import SiteProtocol
from security.secure_aggregation.terms import Minimums, terms_of
from security.signing import public_key_text
from server.round_loop import run_federation
from strategies.codec_of_round import ring_codec
from strategies.draws import rounding_key
from strategies.figures import RoundFigures
from strategies.messages import (
    Envelope,
    InitialStateOrder,
    InitialStateReply,
    JoinOrder,
    JoinReply,
    MaskedUpdate,
    SecureOrder,
    SecureReply,
    TrainOrder,
)
from strategies.ring_scale import largest_change

MASKED_RECIPE = RECIPE + "privacy: {secure_aggregation: true}\n"
REPORT = TrainReport(steps=1, loss_first=1.0, loss_last=1.0, loss_mean=1.0, weight=1, tokens=1, seconds=0.0)
CHANGE = 1e-6


def measure(places: Places) -> Figure:
    few, many = (in_fresh_process(serve, sites=sites).peak_bytes for sites in (FEW, MANY))
    return Figure(
        name="secure_server_memory",
        meaning=f"server's peak memory for {MANY} masked updates a round, relative to that for {FEW}",
        value=many / few,
        unit="",
        target=TARGET,
        details={f"peak_bytes_{FEW}": few, f"peak_bytes_{MANY}": many, "update_bytes": 2 * MANIFEST.size},
    )


def serve(sites: int) -> int:
    """Run a federation of made-up sites that mask; returns its rounds."""
    nodes = {number: f"site-{number}" for number in range(1, sites + 1)}
    masking = _MaskingSites(nodes)
    grid = AllAtOnceGrid(masking.answer, nodes)
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(Path(name) / "run")
        folder.prepare(parse_recipe(MASKED_RECIPE), resume=False)
        run = run_federation(grid, folder.path, lambda: nodes, in_process=True, roster_of=lambda _: masking.roster)
    assert run.void_rounds == 0
    return run.rounds or 0


class _MaskingSites:
    """All sites of the run. What is not about masks they answer like those of `streaming_memory`."""

    def __init__(self, nodes: Mapping[int, str]) -> None:
        self._nodes = nodes
        self._keys = {name: Ed25519PrivateKey.generate() for name in nodes.values()}
        self.roster = {name: public_key_text(key) for name, key in self._keys.items()}
        self._recipe = parse_recipe(MASKED_RECIPE)
        self._initial = TrainableState(MANIFEST, np.zeros(MANIFEST.size, dtype=np.float32))
        self._joined: dict[str, SiteProtocol] = {}

    def answer(self, order: Envelope, node: int) -> Envelope:
        name = self._nodes[node]
        if order.kind == JoinOrder.kind:
            return self._join(name, order.fields["run_id"], JoinReply.open(answer(order, node)))
        if order.kind == InitialStateOrder.kind:
            return InitialStateReply(run_id=order.fields["run_id"], payload=self._initial.to_bytes()).envelope()
        if order.kind == SecureOrder.kind:
            asked = SecureOrder.open(order)
            reply = self._joined[name].answer(asked.step, asked.payload)
            return SecureReply(run_id=asked.run_id, payload=reply).envelope()
        if order.kind == TrainOrder.kind:
            return self._train(name, TrainOrder.open(order))
        return answer(order, node)

    def _join(self, name: str, run_id: str, reply: JoinReply) -> Envelope:
        terms = terms_of(self._recipe, largest_change(self._recipe))
        self._joined[name] = SiteProtocol(name, self._keys[name], self.roster, terms, Minimums(), run_id)
        digests = {"initial_state_digest": self._initial.digest, "roster_digest": roster_digest(self.roster)}
        return reply.model_copy(update=digests).envelope()

    def _train(self, name: str, order: TrainOrder) -> Envelope:
        assert order.ring is not None
        assert order.ring.masking is not None
        start = TrainableState.from_bytes(order.payload, MANIFEST) if order.payload else self._initial
        changes = np.random.default_rng(order.round).standard_normal(MANIFEST.size, dtype=np.float32)
        trained = TrainableState(MANIFEST, start.buffer + np.float32(CHANGE) * changes)
        codec = ring_codec(self._recipe, MANIFEST, order.round, order.ring.scale, order.ring.sites)
        figures = RoundFigures.of(REPORT, None).to_integers()
        vector = codec.encode(trained, start, REPORT.weight, figures, rounding_key(0, name, order.round))
        context = order.context(start.digest, self._recipe.to_yaml(), "0" * 64)
        statement = self._joined[name].mask(order.round, order.ring.masking, context, vector)
        return MaskedUpdate(
            run_id=order.run_id,
            round=order.round,
            manifest_digest=MANIFEST.digest,
            statement=statement,
            resident_seconds=0.0,
            training_seconds=0.0,
            masking_seconds=0.0,
            seconds=0.0,
            payload=codec.view(vector),
        ).envelope()
