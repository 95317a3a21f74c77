"""A federation on one machine: the real server loop and the real ClientApp, with the sites in this process."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, RecordDict

from client.app import make_client_app
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder, Summary
from server.round_loop import run_federation
from simulations.enrolment import identities_of
from simulations.inprocess_grid import InProcessGrid
from simulations.sites import SitePool
from strategies.messages import Envelope

_SITE = "site"


def simulate_federation(
    recipe: Recipe, folder: RunFolder, resume: bool, on_round: Callable[[int, float | None], None]
) -> Summary:
    """Run, or go on with, the federated run in `folder`. The sites keep their own checkpoints under its `sites/`."""
    pool = SitePool(recipe, folder.path / "sites")
    folder.prepare(recipe, resume)
    nodes = dict(enumerate(pool.names, start=1))

    def handle(order: Envelope, context: Context) -> Envelope:
        return pool.service(str(context.node_config[_SITE])).handle(order)

    contexts = {node: Context(1, node, {_SITE: name}, RecordDict(), {}) for node, name in nodes.items()}
    try:
        grid = InProcessGrid(make_client_app(handle), contexts)
        roster = identities_of(pool.names)
        return run_federation(
            grid, folder.path, lambda: nodes, on_round, in_process=True, roster_of=lambda digest: roster
        )
    finally:
        pool.close()
