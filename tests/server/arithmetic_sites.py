"""Sites that each add their own number to the state, and a federated run over them in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from core_training import __version__
from core_training.foundation.state import Manifest, TrainableState
from core_training.foundation.trainable import DataReport, EvalReport, TrainReport
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder, Summary
from flower_transport.in_process import InProcessGrid
from server.round_loop import run_federation
from strategies.messages import (
    Envelope,
    EvaluateOrder,
    EvaluateReply,
    InitialStateReply,
    JoinOrder,
    JoinReply,
    TrainOrder,
    Update,
)

MANIFEST = Manifest.of({"layer.a": (2, 3), "layer.b": (4,)})
START = TrainableState(MANIFEST, np.zeros(MANIFEST.size, dtype=np.float32))
Answer = Callable[[Envelope], Envelope]


class ArithmeticSite:
    """Adds `number` to every value it is sent; `weight` is the number of its loss tokens."""

    def __init__(self, number: float, weight: int) -> None:
        self.number = number
        self.weight = weight
        self.version = __version__
        self.losses = [1.0]

    def __call__(self, order: Envelope) -> Envelope:
        if order.kind == "join":
            join = JoinOrder.open(order)
            return JoinReply(
                run_id=join.run_id,
                version=self.version,
                recipe_digest="0" * 64,
                manifest=MANIFEST.to_json(),
                initial_digest=START.digest,
                initial_state_digest=START.digest,
                roster_digest=None,
                data=DataReport(10, 2, 0, 0),
                layout={"adapter_config.json": "{}"},
            ).envelope()
        if order.kind == "initial":
            return InitialStateReply(run_id=order.fields["run_id"], payload=START.to_bytes()).envelope()
        loss = self._loss(order)
        report = EvalReport(loss_sum=loss, weight=1, examples=1)
        if order.kind == "evaluate":
            evaluate = EvaluateOrder.open(order)
            return EvaluateReply(run_id=evaluate.run_id, round=evaluate.round, evaluation=report).envelope()
        train = TrainOrder.open(order)
        state = TrainableState.from_bytes(train.payload, MANIFEST) if train.payload else START
        return Update(
            run_id=train.run_id,
            round=train.round,
            manifest_digest=MANIFEST.digest,
            weight=float(self.weight),
            train=TrainReport(train.steps, 1.0, 1.0, 1.0, self.weight, self.weight, 0.0),
            evaluation=report if train.evaluate else None,
            resident_seconds=0.0,
            seconds=0.0,
            payload=TrainableState(MANIFEST, state.buffer + np.float32(self.number)).to_bytes(),
        ).envelope()

    def _loss(self, order: Envelope) -> float:
        """The held-out loss of the state that an order brings."""
        return self.losses[min(order.fields["round"], len(self.losses)) - 1]


class SiteWithAnAim(ArithmeticSite):
    """Its held-out loss is how far the values are from `aim`."""

    def __init__(self, number: float, weight: int, aim: float) -> None:
        super().__init__(number, weight)
        self.aim = aim

    def _loss(self, order: Envelope) -> float:
        state = TrainableState.from_bytes(order.payload, MANIFEST) if order.payload else START
        return abs(float(state.buffer[0]) - self.aim)


def federate(
    folder: Path, recipe: Recipe, sites: dict[str, Answer], known: dict[int, str] | None = None, in_process: bool = True
) -> Summary:
    nodes = dict(enumerate(sites, start=1))

    RunFolder(folder).prepare(recipe, resume=folder.exists())
    grid = InProcessGrid(lambda order, node: sites[nodes[node]](order), nodes)
    return run_federation(grid, folder, lambda: known or nodes, in_process=in_process)


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    return list(RunFolder(folder).lines(name))
