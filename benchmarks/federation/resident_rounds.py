"""How soon a site's resident worker starts training once an order has arrived, from the second round on.

A real worker process is asked over its socket, as the SuperNode of a deployment or a gossip node asks it. The worker
itself notes the seconds between an order's arrival and the first step. No model may be loaded again.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import yaml

from benchmarks.figure import Figure
from benchmarks.places import Places
from client.worker_client import ask, start_worker, worker_lock
from core_training import __version__
from core_training.foundation import background
from core_training.recipe.schema import Recipe
from security.private_files import make_private_folder, write_private_file
from strategies.messages import JoinOrder, JoinReply, TrainOrder, Update

TARGET = 1.0
ROUNDS = 6
STEPS = 5
SITE = "niddk"
RUN = "benchmark"


def measure(places: Places) -> Figure:
    recipe = places.recipe(
        f"topology.rounds={ROUNDS}", f"topology.local_steps={STEPS}", "data.train=questions", "model.name_or_path=base"
    ).model_copy(update={"simulation": Recipe.model_fields["simulation"].get_default(call_default_factory=True)})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / SITE
        folder.mkdir(mode=0o700)
        site = {
            "name": SITE,
            "server": "localhost:9092",  # none is asked
            "data": {"questions": str(places.sites[SITE].absolute())},
            "models": {"base": str(places.model.absolute())},
        }
        (folder / "site.yaml").write_text(yaml.safe_dump(site), encoding="utf-8")
        make_private_folder(folder / "keys")
        write_private_file(folder / "keys" / "node.key", b"a key that no network asks for")
        start_worker(folder)
        try:
            joined, waited, unaccounted = _ask_rounds(folder, recipe)
        finally:
            background.stop(worker_lock(folder))
    return Figure(
        name="resident_rounds",
        meaning="seconds from an order's arrival at the worker to the first step, worst round after the first",
        value=max(waited[1:]),
        unit="s",
        target=TARGET,
        details={
            "seconds_to_join": joined,
            "seconds_before_first_step": waited,
            "seconds_of_each_round_beside_training": unaccounted,
        },
    )


def _ask_rounds(folder: Path, recipe: Recipe) -> tuple[float, list[float], list[float]]:
    """Seconds to join; then for each round those before the first step, and all that were not training."""
    began = time.monotonic()
    join = JoinOrder(run_id=RUN, version=__version__, recipe=recipe.to_yaml())
    manifest = JoinReply.open(ask(folder, join.envelope())).parsed_manifest
    joined = time.monotonic() - began
    waited, unaccounted = [], []
    payload = b""
    for number in range(1, ROUNDS + 1):
        order = TrainOrder(
            run_id=RUN,
            round=number,
            steps=STEPS,
            evaluate=False,
            manifest_digest=manifest.digest,
            payload=payload,
        )
        began = time.monotonic()
        update = Update.open(ask(folder, order.envelope()))
        unaccounted.append(time.monotonic() - began - update.train.seconds)
        waited.append(update.resident_seconds)
        payload = update.payload
    return joined, waited, unaccounted
