"""`python -m benchmarks [NAME ...] [--data DIR] [--model DIR]`: measure figures and compare them with their targets.

Without names: all but those of `ASKED_FOR`, which are named at the end, each with the reason. Results are kept in
`runs/bench/results.json`, one entry for each figure, the latest. Exit code 1 says that a target was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import core_training.foundation.environment  # noqa: F401 - before anything that might call home
from benchmarks.figure import Figure
from benchmarks.places import OUTPUT, Places
from core_training.foundation.durable import commit_file
from core_training.foundation.errors import FedloomError
from core_training.models.libraries import own_the_process

MODULES = {
    "data_reading": "data.reading",
    "engine_speed": "engine.speed",
    "step_overhead": "engine.step_overhead",
    "startup": "engine.startup",
    "help": "engine.help_time",
    "memory_estimate": "engine.memory_estimate",
    "real_sites": "federation.real_sites",
    "against_trl": "engine.against_trl",
    "against_llamafactory": "engine.against_llamafactory",
    "simulated_memory": "federation.simulated_memory",
    "federation_overhead": "federation.overhead",
    "deployed_cost": "federation.deployed_cost",
    "large_states": "federation.large_states",
    "resident_rounds": "federation.resident_rounds",
    "streaming_memory": "federation.streaming_memory",
    "secure_aggregation": "secure_aggregation.speed",
    "secure_aggregation_memory": "secure_aggregation.memory",
    "secure_aggregation_streaming": "secure_aggregation.streaming",
    "secure_aggregation_many": "secure_aggregation.many_sites",
    "secure_aggregation_round": "secure_aggregation.round",
    "gossip_bytes": "gossip.bytes",
    "gossip_at_rest": "gossip.at_rest",
    "defaults": "learning.defaults",
    "rules": "learning.rules",
    "skewed": "learning.skewed",
    "medquad": "learning.medquad",
    "quantised": "learning.quantised",
    "private_step": "engine.private_step",
    "private": "learning.private",
    "poisoned": "learning.poisoned",
    "search": "experiments.search",
    "evaluation": "evaluation.speed",
    "against_harness": "evaluation.against_harness",
}
ASKED_FOR = {
    "against_llamafactory": "installs LLaMA-Factory into an environment of its own, from the package index",
    "against_harness": "installs lm-evaluation-harness into an environment of its own, from the package index",
    **dict.fromkeys(
        ("defaults", "rules", "skewed", "medquad", "quantised", "private", "poisoned"),
        "takes a quarter of an hour and more",
    ),
}
"""Those that are measured where they are named, and why not otherwise."""
FIGURES = tuple(name for name in MODULES if name not in ASKED_FOR)
RESULTS = OUTPUT / "results.json"


def main() -> int:
    own_the_process()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MODULES))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/medquad"), help="MedQuAD's folder")
    parser.add_argument(
        "--model", type=Path, default=Path("../shared/models/tiny-medical-base"), help="a model's folder"
    )
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in MODULES]:
        parser.error(f"there is no figure '{unknown[0]}'; there are {', '.join(MODULES)}")
    places = Places(arguments.data.absolute(), arguments.model.absolute())
    all_met = True
    for name in arguments.names or FIGURES:
        try:
            measured: Figure | Iterable[Figure] = import_module(f"benchmarks.{MODULES[name]}").measure(places)
            for figure in [measured] if isinstance(measured, Figure) else measured:
                print(figure.line(), flush=True)
                _keep(figure)
                all_met = all_met and figure.met
        except FedloomError as error:
            print(f"{name}: not measured: {error}", flush=True)
            all_met = False
    for name, why in ASKED_FOR.items() if not arguments.names else ():
        print(f"{name}: not measured unless it is named (python -m benchmarks {name}): it {why}")
    print(f"all values: {RESULTS}")
    return 0 if all_met else 1


def _keep(figure: Figure) -> None:
    known: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    known[figure.name] = {**figure.to_json(), "measured": datetime.now(UTC).isoformat("T", "seconds"), **_machine()}
    commit_file(RESULTS, (json.dumps(known, indent=2) + "\n").encode())


def _machine() -> dict[str, Any]:
    import torch

    return {
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.is_available(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
