"""The same federation on Flower's Ray engine: sites train in several processes of this machine.

Each Ray actor loads the base model once. A site may be served by another actor every round, so it finds its state in
its own checkpoints, as it would after a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from core_training.recipe.reading import load_recipe
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder, Summary
from flower_transport.grid import Grid
from flower_transport.on_ray import run_on_ray
from flower_transport.private_ray import check_ray
from server.round_loop import run_federation
from simulations.enrolment import identities_of
from simulations.sites import SitePool
from strategies.messages import Envelope


def simulate_on_ray(
    recipe: Recipe, folder: RunFolder, on_round: Callable[[int, float | None], None], *, resume: bool
) -> Summary:
    """Run, or go on with, the federated run in `folder`. Raises InputError when Ray is not installed."""
    check_ray()
    pool = SitePool(recipe, folder.path / "sites")  # reads all data here, so that what is wrong shows at once
    names = pool.names
    folder.prepare(pool.recipe, resume=resume)
    run_dir = folder.path.absolute()

    def carry_out(grid: Grid, sites: Mapping[int, int]) -> Summary:
        nodes = {node: names[site] for node, site in sites.items()}
        roster = identities_of(names)
        return run_federation(grid, run_dir, lambda: nodes, on_round, roster_of=lambda digest: roster)

    return run_on_ray(_Actor(str(run_dir)), len(names), carry_out, run_dir / "ray")


class _Actor:
    """The handler of orders in a Ray actor, which builds its sites at the first."""

    _pools: dict[str, SitePool] = {}

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir

    def __call__(self, order: Envelope, site: int) -> Envelope:
        pool = _Actor._pools.get(self._run_dir)
        if pool is None:
            folder = Path(self._run_dir)
            pool = _Actor._pools[self._run_dir] = SitePool(load_recipe(folder / "recipe.yaml"), folder / "sites")
        return pool.service(pool.names[site]).handle(order)
