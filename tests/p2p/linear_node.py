"""A gossip node as an operating-system process, real but for its trainer: `linear_node.py FOLDER ROSTER FOUNDER …`.

Ends like the command line does: exit code 0, 1 or 2, and the error on standard error.
"""

import argparse
import asyncio
import json
import sys
from contextlib import contextmanager
from pathlib import Path

from client.site_config import load_site_config
from core_training.foundation.errors import FedloomError
from p2p.deployment import NodeRun, run_node
from tests.p2p.linear_site import LinearSite, recipe_of

SEEDS = {"alpha": (1, 11, 1.0), "beta": (2, 23, -2.0), "gamma": (3, 5, 0.5), "delta": (4, 17, 2.0)}


def site_named(name, width=6):
    seed, examples, shift = SEEDS[name]
    return LinearSite(seed, examples=examples, shift=shift, width=width)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("roster", type=Path)
    parser.add_argument("founder")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--width", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--linger", type=float, default=20.0)
    parser.add_argument("--deadline", type=float, default=600.0)
    parser.add_argument("--minimum", type=int, default=1)
    parser.add_argument("--fetch-within", type=float, default=None)
    parser.add_argument("--learning-rate", type=float, default=None)
    parser.add_argument("--privacy", type=json.loads, default=None, help="the recipe's section, as JSON")
    arguments = parser.parse_args()
    site = site_named(load_site_config(arguments.folder).name, arguments.width)

    @contextmanager
    def worker(folder):
        async def ask(order):
            if order.kind == "train":
                await asyncio.sleep(arguments.seconds)
            return site.handle(order)

        yield ask

    recipe = recipe_of(
        arguments.rounds,
        minimum_sites=arguments.minimum,
        deadline=arguments.deadline,
        learning_rate=arguments.learning_rate,
        privacy=arguments.privacy,
    )
    node_run = NodeRun(
        arguments.folder,
        arguments.roster,
        recipe,
        arguments.founder,
        linger=arguments.linger,
        fetch_within=arguments.fetch_within,
    )
    try:
        run_node(node_run, worker)
    except FedloomError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
