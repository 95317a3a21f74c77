"""A sample of the fault matrix; `make faults` tries all of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.cells import Cell
from tests.faults.trial import Trials

pytestmark = pytest.mark.slow
SAMPLE = {
    "federated": [
        Cell("federated", False, "line", "uploading", "duplicated"),
        Cell("federated", False, "superlink", "training", "kill"),
    ],
    "gossip": [
        Cell("gossip", False, "node", "committing", "kill"),
    ],
}


@pytest.fixture(scope="module", params=SAMPLE)
def trials(request: pytest.FixtureRequest) -> Iterator[Trials]:
    made = Trials(request.param)
    try:
        yield made
        made.world.stop()
        assert made.world.leftovers() == ([], [])
    finally:
        made.close()


@pytest.mark.timeout(600)
def test_faults_of_a_sample_lose_nothing(trials: Trials) -> None:
    for cell in SAMPLE[trials.topology]:
        verdict = trials.try_cell(cell)
        assert verdict.is_well, verdict
