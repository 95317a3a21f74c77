"""The same federation on Flower's Ray engine: sites train in several processes, or on several machines of a cluster.

Each Ray actor loads the base model once. A site may be served by another actor every round, so it finds its state in
its own checkpoints, as it would after a restart.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from client.app import make_client_app
from core_training.foundation.errors import InputError, RunError
from core_training.recipe.reading import load_recipe
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder, Summary
from server.round_loop import run_federation
from simulations.enrolment import identities_of
from simulations.sites import SitePool
from strategies.flower_records import from_message, to_message
from strategies.messages import Envelope

_WHO = "which-partition"
_NODES_APPEAR_WITHIN = 60.0


def simulate_on_ray(
    recipe: Recipe, folder: RunFolder, resume: bool, on_round: Callable[[int, float | None], None]
) -> Summary:
    """Run, or go on with, the federated run in `folder`. Raises InputError when Ray is not installed."""
    try:
        from flwr.simulation import run_simulation

        __import__("ray")
    except ImportError:
        raise InputError("simulation.engine: 'ray' needs Ray: pip install 'fedloom[simulation]'") from None
    names = SitePool(recipe, folder.path / "sites").names  # reads all data here, so that what is wrong shows at once
    folder.prepare(recipe, resume)
    run_dir = folder.path.absolute()
    outcome: list[Summary | BaseException] = []
    server = ServerApp()

    @server.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        try:
            nodes = _name_nodes(grid, names)
            roster = identities_of(names)
            outcome.append(run_federation(grid, run_dir, lambda: nodes, on_round, roster_of=lambda digest: roster))
        except BaseException as error:
            outcome.append(error)

    run_simulation(
        server_app=server,
        client_app=make_client_app(_Actor(str(run_dir))),
        num_supernodes=len(names),
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"log_to_driver": False, "include_dashboard": False},
        },
    )
    if not outcome:
        raise RunError("Flower's simulation ended before the run did")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


class _Actor:
    """Answers orders in a Ray actor, which builds its pool of sites at the first one."""

    _pools: dict[str, SitePool] = {}

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir

    def __call__(self, order: Envelope, context: Context) -> Envelope:
        partition = int(context.node_config["partition-id"])
        if order.kind == _WHO:
            return Envelope.of(_WHO, {"partition": partition})
        pool = _Actor._pools.get(self._run_dir)
        if pool is None:
            folder = Path(self._run_dir)
            pool = _Actor._pools[self._run_dir] = SitePool(load_recipe(folder / "recipe.yaml"), folder / "sites")
        return pool.service(pool.names[partition]).handle(order)


def _name_nodes(grid: Grid, names: list[str]) -> dict[int, str]:
    """Flower's random node ids with the sites' names: every node says which partition it is."""
    deadline = time.monotonic() + _NODES_APPEAR_WITHIN
    while len(nodes := list(grid.get_node_ids())) < len(names):
        if time.monotonic() > deadline:
            raise RunError(
                f"Flower's simulation has {len(nodes)} of {len(names)} sites after {_NODES_APPEAR_WITHIN:g} s"
            )
        time.sleep(0.1)
    replies = grid.send_and_receive([to_message(Envelope.of(_WHO, {}), node) for node in nodes])
    return {reply.metadata.src_node_id: names[from_message(reply).fields["partition"]] for reply in replies}
