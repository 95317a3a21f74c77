"""The server's peak memory for 64 updates in a round, against that for 4: updates are added as they come, not kept.

The real round loop runs in a fresh process; sites answer made-up updates of ten million parameters. Like the grid over
a SuperLink, the one used here hands over one reply after the other, each when the one before has been taken in.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.figure import Figure
from benchmarks.fresh_process import in_fresh_process
from benchmarks.places import Places
from core_training import __version__
from core_training.foundation.state import Manifest, TrainableState
from core_training.foundation.trainable import DataReport, EvalReport, TrainReport
from core_training.recipe.reading import parse_recipe
from core_training.runs.run_folder import RunFolder
from flower_transport.in_process import InProcessGrid
from server.round_loop import run_federation
from strategies.messages import (
    Envelope,
    EvaluateOrder,
    EvaluateReply,
    JoinOrder,
    JoinReply,
    TrainOrder,
    Update,
)

TARGET = 1.2
FEW, MANY = 4, 64
MANIFEST = Manifest.of({f"layer.{number:02d}": (1000, 1000) for number in range(10)})
RECIPE = """
model: {name_or_path: none}
stage: pretrain
topology: {kind: federated, rounds: 2, local_steps: 1}
"""


def measure(places: Places) -> Figure:
    few, many = (in_fresh_process(serve, sites=sites).peak_bytes for sites in (FEW, MANY))
    return Figure(
        name="streaming_memory",
        meaning=f"server's peak memory for {MANY} updates a round, relative to that for {FEW}",
        value=many / few,
        unit="",
        target=TARGET,
        details={
            f"peak_bytes_{FEW}": few,
            f"peak_bytes_{MANY}": many,
            "update_bytes": 4 * MANIFEST.size,
        },
    )


def serve(sites: int) -> int:
    """Run a federation of made-up sites; returns its rounds."""
    nodes = {number: f"site-{number}" for number in range(1, sites + 1)}
    grid = InProcessGrid(answer, nodes)
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(Path(name) / "run")
        folder.prepare(parse_recipe(RECIPE), resume=False)
        return run_federation(grid, folder.path, lambda: nodes, in_process=True).rounds or 0


def answer(order: Envelope, node: int) -> Envelope:
    """What a site would answer, with random tensors."""
    evaluation = EvalReport(loss_sum=1.0, weight=1, examples=1)
    if order.kind == JoinOrder.kind:
        return JoinReply(
            run_id=order.fields["run_id"],
            version=__version__,
            recipe_digest="0" * 64,
            manifest=MANIFEST.to_json(),
            initial_digest="0" * 64,
            initial_state_digest="0" * 64,
            roster_digest=None,
            data=DataReport(1, 1, 0, 0),
            layout={"config.json": "{}"},
        ).envelope()
    number = order.fields["round"]
    if order.kind == EvaluateOrder.kind:
        return EvaluateReply(run_id=order.fields["run_id"], round=number, evaluation=evaluation).envelope()
    assert order.kind == TrainOrder.kind
    values = np.random.default_rng([number, node]).standard_normal(MANIFEST.size, dtype=np.float32)
    return Update(
        run_id=order.fields["run_id"],
        round=number,
        manifest_digest=MANIFEST.digest,
        weight=1.0,
        train=TrainReport(steps=1, loss_first=1.0, loss_last=1.0, loss_mean=1.0, weight=1, tokens=1, seconds=0.0),
        evaluation=evaluation,
        resident_seconds=0.0,
        seconds=0.0,
        payload=TrainableState(MANIFEST, values).to_bytes(),
    ).envelope()
