"""A simulated federation whose sites fail on demand: real sites and a real server, and a fault between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from core_training.foundation.errors import ProtocolError
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder, Summary
from flower_transport.in_process import InProcessGrid
from server.round_loop import run_federation
from simulations.enrolment import identities_of
from simulations.sites import SitePool
from strategies.messages import Envelope

Fault = Callable[[str, Envelope], str | None]
"""Of a site and an order: "before" it is carried out the site is lost, "after" it the answer is; None is no fault."""


def federate(
    recipe: Recipe, folder: Path, fault: Fault, sites: list[str] | None = None, running: SitePool | None = None
) -> Summary:
    """Run the recipe's simulated federation, or go on with it; `sites` are those that the server knows (all).

    `running`: sites that stay up afterwards; else all are started, and closed at the end.
    """
    run = RunFolder(folder)
    pool = running or SitePool(recipe, folder / "sites")
    run.prepare(recipe, resume=(folder / "recipe.yaml").exists())
    nodes = {node: name for node, name in enumerate(pool.names, start=1) if sites is None or name in sites}

    def handle(order: Envelope, node: int) -> Envelope:
        name = nodes[node]
        when = fault(name, order)
        if when == "before":
            raise ProtocolError(f"{name} is gone")
        answer = pool.service(name).handle(order)
        if when == "after":
            raise ProtocolError(f"the answer of {name} is lost")
        return answer

    try:
        grid = InProcessGrid(handle, nodes)
        roster = identities_of(pool.names)
        return run_federation(grid, folder, lambda: nodes, in_process=True, roster_of=lambda digest: roster)
    finally:
        if running is None:
            pool.close()
