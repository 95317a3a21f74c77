"""The group gate in a real federation on this machine: votes travel over Flower, and a killed server goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.deployment import start_site, stop_site
from core_training.foundation import background
from core_training.foundation.errors import InputError
from core_training.runs import events
from core_training.runs.run_folder import RunFolder
from server.deployment import admit_site, start_server, stop_server, submit_run
from server.federation import Federation
from tests import tiny
from tests.server.processes import kill
from tests.server.test_deployment import RECIPE, ROOT, new_federation, new_site, outcome, wait_for

pytestmark = pytest.mark.slow
NAMES = ("north", "south", "west")
GATE = ["aggregation.rule=group_gate", "data.eval_fraction=0.3", "topology.rounds=2"]


@pytest.fixture
def deployed(tmp_path: Path) -> Iterator[tuple[Federation, Path]]:
    """A running server with three connected sites."""
    path, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), str(ROOT)
    model, federation, sites = tiny.make_model(tmp_path / "model"), new_federation(tmp_path / "federation"), []
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    try:
        start_server(federation)
        for seed, name in enumerate(NAMES):
            data = tiny.write_jsonl(tmp_path / f"{name}.jsonl", tiny.texts(seed, 40))
            sites.append(new_site(tmp_path / name, federation, data, model))
            admit_site(federation, name, tmp_path / name / "keys" / "node.pub")
            start_site(tmp_path / name)
        yield federation, tmp_path
    finally:
        for site in sites:
            stop_site(site)
        stop_server(federation)
        os.environ.pop("PYTHONPATH")
        if path is not None:
            os.environ["PYTHONPATH"] = path


def test_groups_vote_over_flower_though_the_server_is_killed_in_a_vote(deployed: tuple[Federation, Path]) -> None:
    federation, folder = deployed
    with pytest.raises(InputError, match="takes 4 groups here, so 4 sites at least, and there are 3"):
        submit_run(federation, folder / "recipe.yaml", [*GATE, "aggregation.group_gate.groups=4"])
    run_id = submit_run(federation, folder / "recipe.yaml", GATE)
    sites = [RunFolder(folder / name / "runs" / run_id) for name in NAMES]
    # Whoever has trained is asked to vote next: in most runs of this test the server is killed in the vote.
    wait_for(lambda: all(list(site.events(events.SliceTrained)) for site in sites), within=240)
    if background.owner(federation.run_lock(run_id)) is not None:
        kill(federation.run_lock(run_id))
    summary = outcome(federation, run_id)
    assert (summary["status"], summary["rounds"], summary["void_rounds"]) == ("completed", 2, 0)
    tried = {event.round: event.groups for event in RunFolder(federation.runs / run_id).events(events.GroupsTried)}
    assert sorted(tried) == [1, 2]
    for groups in tried.values():
        assert sorted(site for group in groups.values() for site in group["sites"]) == sorted(NAMES)
        assert all(group["voted"] for group in groups.values())
    assert summary["eval_loss"] < summary["eval_loss_initial"]
