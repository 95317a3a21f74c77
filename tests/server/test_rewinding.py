"""A run is taken back to an earlier round, and goes on as if what came after had never been."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from core_training.foundation.errors import InputError
from core_training.foundation.state import TrainableState
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from server.deployment import init_federation
from server.federation import Address, Federation, Site
from server.rewinding import rewind
from server.run_store import RunStore
from simulations.federated import simulate_federation
from strategies.messages import Envelope
from tests.fedloom.conftest import Command, fedloom  # noqa: F401 - a fixture
from tests.server.arithmetic_sites import MANIFEST, ArithmeticSite, SiteWithAnAim, events, federate

MakeRecipe = Callable[..., Recipe]


class PoisonedInRound3(ArithmeticSite):
    """Adds far too much in one round, within what nobody can tell from training."""

    def __call__(self, order: Envelope) -> Envelope:
        self.number = 50.0 if order.fields.get("round") == 3 else 1.0
        return super().__call__(order)


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> Recipe:
    return make_recipe(
        topology={"kind": "federated", "rounds": 4, "local_steps": 1, "keep_rounds": 3, "minimum_sites": 2}
    )


@pytest.fixture
def sites() -> dict[str, ArithmeticSite]:
    return {"a": ArithmeticSite(1.0, 10), "b": ArithmeticSite(1.0, 10), "mallory": PoisonedInRound3(1.0, 10)}


def values(run: Path) -> np.ndarray:
    committed = RunStore(RunFolder(run)).latest()
    assert committed is not None
    return committed[1].buffer


def test_a_poisoned_round_is_undone_and_the_run_goes_on_without_the_site(
    tmp_path: Path, recipe: Recipe, sites: dict[str, ArithmeticSite]
) -> None:
    run = tmp_path / "run"
    poisoned = federate(run, recipe, dict(sites))
    assert values(run).max() > 15
    rewind(run, 2, ["mallory"])
    assert not (run / "summary.json").exists()
    assert not (run / "adapter").exists()
    np.testing.assert_array_equal(values(run), 2.0)
    assert RunFolder(run).status().round == 2
    summary = federate(run, recipe, dict(sites), known={1: "a", 2: "b"})
    np.testing.assert_array_equal(values(run), 4.0)
    assert (summary.status, summary.rounds) == ("completed", 4)
    assert summary.state_digest != poisoned.state_digest
    assert {name: site.rounds for name, site in summary.sites.items()} == {"a": 4, "b": 4, "mallory": 2}
    assert [row["round"] for row in RunFolder(run).curve()] == [0, 1, 2, 3, 4]


def test_the_start_of_a_run_is_a_round_too(tmp_path: Path, recipe: Recipe, sites: dict[str, ArithmeticSite]) -> None:
    run = tmp_path / "run"
    federate(run, recipe, dict(sites))
    rewind(run, 0)
    summary = federate(run, recipe, {name: ArithmeticSite(2.0, 10) for name in ("a", "b")})
    np.testing.assert_array_equal(values(run), 8.0)
    assert {name: site.rounds for name, site in summary.sites.items()} == {"a": 4, "b": 4}


def test_a_round_whose_state_is_not_kept_is_refused_with_those_that_are(
    tmp_path: Path, recipe: Recipe, sites: dict[str, ArithmeticSite]
) -> None:
    run = tmp_path / "run"
    federate(run, recipe, dict(sites))
    for to in (1, 5):
        with pytest.raises(
            InputError, match=rf"--to {to}: .* round 0, 2, 3, 4 \(0: its start\).*topology\.keep_rounds"
        ):
            rewind(run, to)
    assert (run / "summary.json").exists()
    assert RunStore(RunFolder(run)).rounds() == [2, 3, 4]


def test_a_run_under_masks_is_not_taken_back(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    secure = make_recipe(
        topology={"kind": "federated", "rounds": 4, "local_steps": 1}, privacy={"secure_aggregation": True}
    )
    RunFolder(tmp_path / "run").prepare(secure, resume=False)
    with pytest.raises(InputError, match="aggregates securely"):
        rewind(tmp_path / "run", 0)


def test_where_the_best_state_so_far_is_gone_the_run_is_taken_back_to_its_start_alone(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    run = tmp_path / "run"
    judged = make_recipe(
        topology={"kind": "federated", "rounds": 4, "local_steps": 1, "keep_rounds": 4},
        training={"load_best_model_at_end": True},
    )
    federate(run, judged, {"a": SiteWithAnAim(1.0, 10, aim=9.0)})
    with pytest.raises(InputError, match="the best state so far, of round 1, was kept no longer"):
        rewind(run, 2)
    rewind(run, 0)
    summary = federate(run, judged, {"a": SiteWithAnAim(1.0, 10, aim=2.0)})
    assert summary.state_digest == digest_of(2.0)


def digest_of(value: float) -> str:
    return TrainableState(MANIFEST, np.full(MANIFEST.size, value, dtype=np.float32)).digest


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_real_sites_follow_a_run_that_was_taken_back_and_keep_nothing_of_what_is_undone(
    tmp_path: Path, make_recipe: MakeRecipe, site_files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = make_recipe(
        simulation={"sites": [str(path) for path in site_files]},
        topology={"kind": "federated", "rounds": 4, "local_steps": 2, "keep_rounds": 4},
    )
    run = tmp_path / "run"
    whole = simulate_federation(trained, RunFolder(run), lambda *_: None, resume=False)
    # The sites still have what they trained in rounds 3 and 4, from the very same states.
    rewind(run, 2)
    assert simulate_federation(trained, RunFolder(run), lambda *_: None, resume=True).state_digest == whole.state_digest

    def dies(number: int, loss: float | None) -> None:
        if number == 2:
            raise Killed

    rewind(run, 1, ["site0"])
    with pytest.raises(Killed):
        simulate_federation(trained, RunFolder(run), dies, resume=True)
    for site in ("site1", "site2"):
        assert max(path.name for path in (run / "sites" / site / run.name / "checkpoints").iterdir()) == "round-000002"


# --- the command, on a federation's folder


@pytest.fixture
def federation(tmp_path: Path, recipe: Recipe, sites: dict[str, ArithmeticSite]) -> Federation:
    """A federation without a server that runs, and a finished run in it."""
    made = init_federation(tmp_path / "federation", Address(port=9), [])
    for number, name in enumerate(sites, start=1):
        made.admit(Site(name=name, public_key=f"key of {name}", node_id=None))
        made.set_node_id(name, number)
    federate(made.runs / "run", recipe, dict(sites))
    return made


def test_the_command_takes_a_run_back_and_leaves_sites_out_of_it(federation: Federation, fedloom: Command) -> None:  # noqa: F811
    folder = ("--folder", federation.folder)
    ended = fedloom("server", "rewind", "run", "--to", 2, "--without", "mallory", *folder, "--json")
    assert (ended.code, json.loads(ended.out)) == (
        0, {"run_id": "run", "round": 2, "without": ["mallory"], "goes_on": False}
    )  # fmt: skip
    assert federation.sites_of("run") == {1: "a", 2: "b"}
    assert [(event["round"], event["without"]) for event in events(federation.runs / "run", "rewound")] == [
        (2, ["mallory"])
    ]
    shown = fedloom("server", "status", *folder)
    assert "taken back to the end of round 2, to go on without mallory" in shown.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("run", "--to", 1), "--to 1: run can be taken back to the end of round 0, 2, 3, 4"),
        (("another", "--to", 1), "no run 'another' here"),
        (("run", "--to", 2, "--without", "nobody"), "--without nobody: no site of that name is admitted"),
        (("run", "--to", 2, "--without", "a", "--without", "b"), "1 sites would be left, and the run needs 2"),
    ],
)
def test_what_cannot_be_done_is_refused_and_the_run_stays_as_it_is(
    federation: Federation,
    fedloom: Command,  # noqa: F811
    arguments: tuple[object, ...],
    says: str,
) -> None:
    ended = fedloom("server", "rewind", *arguments, "--folder", federation.folder)
    assert ended.code == 2
    assert says in " ".join(ended.err.split())
    assert (federation.runs / "run" / "summary.json").exists()
    assert RunStore(RunFolder(federation.runs / "run")).rounds() == [2, 3, 4]
    assert yaml.safe_load((federation.runs / "run" / "recipe.yaml").read_text())["topology"]["keep_rounds"] == 3
