"""Many sites on one machine, for both topologies: real loop, real node, real engine; only the network is left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from core_training.recipe import Recipe
    from core_training.run_folder import RunFolder, Summary


def simulate(recipe: Recipe, folder: RunFolder, resume: bool, on_round: Callable[[int, float | None], None]) -> Summary:
    """Run what the recipe's topology and engine say. `on_round(round, mean training loss)` follows each round."""
    if recipe.topology.kind == "gossip":
        return _simulate_gossip(recipe, folder, resume, on_round)
    if recipe.simulation.engine == "ray":
        from simulations.ray_engine import simulate_on_ray

        return simulate_on_ray(recipe, folder, resume, on_round)
    from simulations.federated import simulate_federation

    return simulate_federation(recipe, folder, resume, on_round)


def _simulate_gossip(
    recipe: Recipe, folder: RunFolder, resume: bool, on_round: Callable[[int, float | None], None]
) -> Summary:
    import shutil

    from core_training.durable import commit_folder
    from core_training.export import result_name
    from simulations.gossip import RUN_ID, simulate_gossip
    from simulations.sites import SitePool

    pool = SitePool(recipe, folder.path / "sites")
    folder.prepare(recipe, resume)
    try:
        summary = simulate_gossip(recipe, {name: pool.ask(name) for name in pool.names}, folder, on_round=on_round)
    finally:
        pool.close()
    if recipe.aggregation.mixing == "group":  # all nodes end with one state, so any node's result is the run's
        result = result_name(recipe)
        with commit_folder(folder.path / result) as scratch:
            shutil.copytree(folder.path / "sites" / pool.names[0] / RUN_ID / result, scratch, dirs_exist_ok=True)
    return summary
