"""A federation on one machine: the real server loop and the real ClientApp, with the sites in this process."""

from __future__ import annotations

from collections.abc import Callable

from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder, Summary
from flower_transport.in_process import InProcessGrid
from server.round_loop import run_federation
from simulations.enrolment import identities_of
from simulations.sites import SitePool


def simulate_federation(
    recipe: Recipe, folder: RunFolder, on_round: Callable[[int, float | None], None], *, resume: bool
) -> Summary:
    """Run, or go on with, the federated run in `folder`. The sites keep their own checkpoints under its `sites/`."""
    pool = SitePool(recipe, folder.path / "sites")
    folder.prepare(pool.recipe, resume=resume)
    nodes = dict(enumerate(pool.names, start=1))
    try:
        grid = InProcessGrid(lambda order, node: pool.service(nodes[node]).handle(order), nodes)
        roster = identities_of(pool.names)
        return run_federation(
            grid, folder.path, lambda: nodes, on_round, in_process=True, roster_of=lambda digest: roster
        )
    finally:
        pool.close()
