"""Many sites on one machine, for both topologies: real loop, real node, real engine; only the network is left out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

from core_training.foundation.durable import commit_folder
from core_training.runs.result_format import result_name
from core_training.runs.trackers import check_trackers

if TYPE_CHECKING:
    from core_training.recipe.schema import Recipe
    from core_training.runs.run_folder import RunFolder, Summary

OnRound = Callable[[int, float | None], None]


def simulate(
    recipe: Recipe, folder: RunFolder, on_round: OnRound = lambda *_: None, *, resume: bool = False
) -> Summary:
    """Run what the recipe's topology and engine say. `on_round(round, mean training loss)` follows each round."""
    check_trackers(recipe)  # before a model is loaded
    summary = _simulation(recipe)(recipe, folder, on_round, resume=resume)
    if summary.state_digest is not None:
        _take_over_result(recipe, folder)
    return summary


def _simulation(recipe: Recipe) -> Callable[..., Summary]:
    if recipe.topology.kind == "gossip":
        return _simulate_gossip
    if recipe.simulation.engine == "ray":
        from simulations.ray_engine import simulate_on_ray

        return simulate_on_ray
    from simulations.federated import simulate_federation

    return simulate_federation


def _simulate_gossip(recipe: Recipe, folder: RunFolder, on_round: OnRound, *, resume: bool) -> Summary:
    from simulations.gossip import simulate_gossip
    from simulations.sites import SitePool

    pool = SitePool(recipe, folder.path / "sites")
    folder.prepare(pool.recipe, resume=resume)
    try:
        return simulate_gossip(pool.recipe, {name: pool.ask(name) for name in pool.names}, folder, on_round=on_round)
    finally:
        pool.close()


def _take_over_result(recipe: Recipe, folder: RunFolder) -> None:
    """All sites ended with one state, so any site's result is the run's, where the run has no whole one of its own.

    Sites that keep a factor of their own each ended with another.
    """
    result = result_name(recipe)
    if not recipe.aggregation.sharing_part.keeps_own and not (folder.path / result).is_dir():
        with commit_folder(folder.path / result) as scratch:
            shutil.copytree(min(folder.path.glob(f"sites/*/*/{result}")), scratch, dirs_exist_ok=True)
