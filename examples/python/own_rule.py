"""An aggregation rule of your own: each value is the middle of the sites' values, so that no single site can pull it.

`python -m examples.python.own_rule BASE_MODEL OUT SITE.jsonl SITE.jsonl …`; a record has `text`.
"""

import sys

import numpy as np

from core_training.foundation.state import Manifest, TrainableState
from core_training.parts.aggregation_rules import AggregationPart
from core_training.parts.section import Section
from fedloom import AGGREGATION_RULES


class Median:
    """The coordinate-wise median (Yin et al. 2018)."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._states: list[TrainableState] = []

    def add(self, state: TrainableState, weight: float) -> None:
        self._states.append(state)

    def result(self) -> TrainableState:
        middle = np.median([state.buffer for state in self._states], axis=0)
        return TrainableState(self._manifest, middle.astype(np.float32))


AGGREGATION_RULES.add(AggregationPart[Section](name="middle", target=Median))


def main(model: str, out: str, *sites: str) -> None:
    from fedloom import Recipe, simulate

    recipe = Recipe(
        model={"name_or_path": model},
        stage="pretrain",
        topology={"kind": "federated", "rounds": 2, "local_steps": 2},
        aggregation={"rule": "middle"},
        simulation={"sites": list(sites)},
        output=out,
    )
    summary = simulate(recipe, on_round=lambda number, loss: print(f"round {number}: {loss:.3f}"))
    print(f"held-out loss: {summary.eval_loss:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
