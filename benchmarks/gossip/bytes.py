"""How many bytes a parameter each of five nodes sends in one masked averaging in a group, over gRPC with TLS.

Five real processes on this machine; only their sites are stand-ins, which move ten million values a little. Counted is
all that a node hands to the wire in the run (one epoch): keys, masked chunks, sums, and what announces them.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.figure import Figure
from benchmarks.places import Places
from core_training import __version__
from core_training.foundation.errors import ProtocolError, RunError
from core_training.foundation.state import Manifest, TrainableState
from core_training.foundation.trainable import DataReport, EvalReport, TrainReport
from core_training.recipe.reading import parse_recipe
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from p2p.deployment import NodeRun, make_roster, run_node
from p2p.node_folder import init_node
from p2p.site_orders import Ask
from strategies.messages import (
    Envelope,
    EvaluateOrder,
    EvaluateReply,
    InitialStateOrder,
    InitialStateReply,
    JoinOrder,
    JoinReply,
    TrainOrder,
    Update,
)

MEMBERS = 5
PARAMETERS = 10_000_000
TARGET = 2 * (MEMBERS - 1) / MEMBERS * 2.05
MANIFEST = Manifest.of({"weights": (PARAMETERS,)})
_WITHIN_SECONDS = 300


def measure(places: Places) -> Figure:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folders = [folder / f"node{number}" for number in range(MEMBERS)]
        entries = [init_node(one, one.name, free_address(), {"none": ["none"]}, {"none": "none"}) for one in folders]
        roster = folder / "roster.json"
        _, founder = make_roster(entries, folder / "founder", roster)
        before = _loopback_bytes()
        command = [sys.executable, "-m", "benchmarks.gossip.bytes"]
        nodes = [subprocess.Popen([*command, str(one), str(roster), founder]) for one in folders]
        try:
            if any(node.wait(_WITHIN_SECONDS) for node in nodes):
                raise RunError("a node failed; what it wrote above says why")
        finally:
            for node in nodes:
                node.kill()
        on_the_wire = _loopback_bytes() - before
        runs = [RunFolder(next((one / "runs").iterdir())) for one in folders]
        sent = [float((run.summary() or {})["bytes_up"]) / PARAMETERS for run in runs]
        (group,) = runs[0].lines("group_sum")
        (epoch,) = runs[0].lines("epoch")
    return Figure(
        name="gossip_bytes",
        meaning=f"bytes a parameter that a node sends in one masked averaging of {MEMBERS} nodes, the most of them",
        value=max(sent),
        unit="B",
        target=TARGET,
        details={
            "parameters": PARAMETERS,
            "sent_by_each": sent,
            "loopback_bytes_a_parameter_and_node": on_the_wire / PARAMETERS / MEMBERS,
            "members_in_the_sum": len(group["members"]),
            "masked": group["masked"],
            "seconds_of_the_epoch": epoch["seconds"],
        },
    )


def main() -> None:
    folder, roster, founder = sys.argv[1:]
    recipe = parse_recipe(
        "{model: {name_or_path: none}, stage: sft, data: {train: none}, privacy: {secure_aggregation: true}, "
        "topology: {kind: gossip, rounds: 1, local_steps: 10}}"
    )
    run_node(NodeRun(Path(folder), Path(roster), recipe, founder), _site)


@contextmanager
def _site(folder: Path) -> Iterator[Ask]:
    """Answers a node's orders without a model."""
    initial = TrainableState(MANIFEST, np.zeros(PARAMETERS, dtype=np.float32))
    seed = int(folder.name.removeprefix("node"))

    async def ask(order: Envelope) -> Envelope:
        if order.kind == JoinOrder.kind:
            return _joined(JoinOrder.open(order), initial).envelope()
        if order.kind == InitialStateOrder.kind:
            run_id = InitialStateOrder.open(order).run_id
            return InitialStateReply(run_id=run_id, payload=initial.to_bytes()).envelope()
        if order.kind == TrainOrder.kind:
            return _trained(TrainOrder.open(order), seed).envelope()
        if order.kind == EvaluateOrder.kind:
            evaluate = EvaluateOrder.open(order)
            report = EvalReport(0.0, 1, 1)
            return EvaluateReply(run_id=evaluate.run_id, round=evaluate.round, evaluation=report).envelope()
        raise ProtocolError(f"unknown order '{order.kind}'")

    yield ask


def _joined(order: JoinOrder, initial: TrainableState) -> JoinReply:
    recipe: Recipe = parse_recipe(order.recipe)
    return JoinReply(
        run_id=order.run_id,
        version=__version__,
        recipe_digest=recipe.engine_digest,
        manifest=MANIFEST.to_json(),
        initial_digest=initial.digest,
        initial_state_digest=initial.digest,
        roster_digest=None,
        data=DataReport(1, 1, 0, 0),
        layout={},
    )


def _trained(order: TrainOrder, seed: int) -> Update:
    change = np.random.default_rng(seed).standard_normal(PARAMETERS, dtype=np.float32)
    change *= np.float32(1e-5)
    return Update(
        run_id=order.run_id,
        round=order.round,
        manifest_digest=MANIFEST.digest,
        weight=1000.0,
        train=TrainReport(order.steps, 1.0, 1.0, 1.0, 1000, 1000, 0.0),
        evaluation=None,
        resident_seconds=0.0,
        seconds=0.0,
        payload=TrainableState(MANIFEST, change).to_bytes(),
    )


def free_address() -> str:
    """HOST:PORT at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def _loopback_bytes() -> int:
    """All that was sent over this machine's loopback, by whomever, with TLS, gRPC and TCP."""
    for line in Path("/proc/net/dev").read_text(encoding="utf-8").splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    return 0


if __name__ == "__main__":
    main()
