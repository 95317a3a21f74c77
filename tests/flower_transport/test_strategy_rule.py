"""Flower's strategies, and a class of one's own, as aggregation rules: on our rounds, commits and restarts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core_training.foundation.errors import InputError, RunError
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from flower_transport.in_process import InProcessGrid
from server.rewinding import rewind
from server.round_loop import run_federation
from server.run_store import RunStore
from simulations import simulate
from tests.server.arithmetic_sites import ArithmeticSite, federate

MakeRecipe = Callable[..., Recipe]
FLOWERS = "flwr.serverapp.strategy:"
OWN = """
from flwr.serverapp.strategy import FedAvg

class Halved(FedAvg):
    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        for key in list(arrays):
            arrays[key] = type(arrays[key])(arrays[key].numpy() / 2)
        return arrays, metrics

class Remembering(FedAvg):
    seen, norms, last, record, previous = 0, None, None, None, None
    def __init__(self, what):
        super().__init__()
        self.what = what
    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        if self.what == "seen":
            self.seen += 1
        elif self.what == "norms":
            self.norms = [*(self.norms or []), 1.0]
        elif self.what == "last":
            self.last = {"node": server_round}
        else:
            setattr(self, self.what, arrays)
        return arrays, metrics

class HeavyBall(FedAvg):
    def __init__(self):
        super().__init__()
        self.before = None
    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        means = {key: array.numpy() for key, array in arrays.items()}
        if self.before is not None:
            for key in self.before:
                self.before[key] *= -0.5
                self.before[key] += 1.5 * means[key]
                arrays[key] = type(arrays[key])(self.before[key].copy())
        self.before = means
        return arrays, metrics

class Failing(FedAvg):
    def aggregate_train(self, server_round, replies):
        raise KeyError("weights")
"""


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "flwr")


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> MakeRecipe:
    def make(strategy: str, rounds: int = 4, arguments: dict[str, Any] | None = None, **sections: Any) -> Recipe:
        return make_recipe(
            topology={"kind": "federated", "rounds": rounds, "local_steps": 1, "keep_rounds": 9},
            aggregation={"rule": "flower", "flower": {"strategy": strategy, "arguments": arguments or {}}},
            **sections,
        )

    return make


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_strategies.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_strategies:"


def sites() -> dict[str, ArithmeticSite]:
    """Sites that move every value by 1, 2 and 6, of unequal weight."""
    return {"a": ArithmeticSite(1.0, 10), "b": ArithmeticSite(2.0, 20), "c": ArithmeticSite(6.0, 10)}


def states(run: Path) -> list[float]:
    store = RunStore(RunFolder(run), 9)
    return [np.unique(store.read(number)[1].buffer).item() for number in store.rounds()]


@pytest.mark.parametrize(
    ("strategy", "arguments", "move"),
    [
        ("FedAvg", {}, (10 + 40 + 60) / 40),
        ("FedMedian", {}, 2.0),
        ("FedTrimmedAvg", {"beta": 0.34}, 2.0),
        ("Krum", {"num_malicious_nodes": 0}, None),
        ("FedAvgM", {"server_momentum": 0.5}, None),
        ("FedAdagrad", {"eta": 0.1}, None),
        ("FedYogi", {"eta": 0.1}, None),
    ],
)
def test_a_strategy_of_flowers_makes_the_next_state(
    tmp_path: Path, recipe: MakeRecipe, strategy: str, arguments: dict[str, Any], move: float | None
) -> None:
    federate(tmp_path / "run", recipe(FLOWERS + strategy, arguments=arguments), dict(sites()))
    reached = states(tmp_path / "run")
    assert len(reached) == 4
    if move is not None:
        np.testing.assert_allclose(reached, move * np.arange(1, 5), rtol=1e-6)


def test_adam_of_flowers_is_adam_as_it_is_over_many_rounds(tmp_path: Path, recipe: MakeRecipe) -> None:
    """Against the class itself, driven by hand over the same means; it corrects the moments' start by round + 1."""
    settings = {"eta": 0.1, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3}
    federate(tmp_path / "run", recipe(FLOWERS + "FedAdam", arguments=settings), dict(sites()))
    x, m, v, reached = 0.0, 0.0, 0.0, []
    for number in range(1, 5):
        delta = 2.75
        m, v = 0.9 * m + 0.1 * delta, 0.99 * v + 0.01 * delta**2
        eta = 0.1 * np.sqrt(1 - 0.99 ** (number + 1)) / (1 - 0.9 ** (number + 1))
        x += eta * m / (np.sqrt(v) + 1e-3)
        reached.append(x)
    np.testing.assert_allclose(states(tmp_path / "run"), reached, rtol=1e-5)


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it and tidy up."""


@pytest.mark.parametrize("strategy", ["FedAdam", "FedAvgM"])
def test_what_a_strategy_remembers_survives_a_kill_and_is_taken_back_with_a_round(
    tmp_path: Path, recipe: MakeRecipe, strategy: str
) -> None:
    arguments = {"server_momentum": 0.9} if strategy == "FedAvgM" else {"eta": 0.1}
    wanted = recipe(FLOWERS + strategy, arguments=arguments)
    whole = federate(tmp_path / "whole", wanted, dict(sites()))
    nodes = dict(enumerate(answers := sites(), start=1))

    def kill(number: int, loss: float | None) -> None:
        if number == 2:
            raise Killed

    RunFolder(tmp_path / "run").prepare(wanted, resume=False)
    grid = InProcessGrid(lambda order, node: answers[nodes[node]](order), nodes)
    with pytest.raises(Killed):
        run_federation(grid, tmp_path / "run", lambda: nodes, kill, in_process=True)
    assert federate(tmp_path / "run", wanted, dict(sites())).state_digest == whole.state_digest
    rewind(tmp_path / "run", 1)
    assert federate(tmp_path / "run", wanted, dict(sites())).state_digest == whole.state_digest
    assert len(set(np.diff(states(tmp_path / "whole")))) == 3, "each round steps by what it remembers"


def test_a_class_of_ones_own_trains_in_a_simulation(
    tmp_path: Path, recipe: MakeRecipe, site_files: list[Path], own: str
) -> None:
    wanted = recipe(own + "Halved", rounds=2, simulation={"sites": [str(path) for path in site_files]})
    summary = simulate(wanted, RunFolder(tmp_path / "run"))
    assert (summary.status, summary.rounds_done) == ("completed", 2)


def test_the_order_of_arrival_changes_no_bit(tmp_path: Path, recipe: MakeRecipe) -> None:
    wanted = recipe(FLOWERS + "FedAvg")
    first = federate(tmp_path / "one", wanted, dict(sites()))
    assert federate(tmp_path / "two", wanted, dict(reversed(sites().items()))).state_digest == first.state_digest


@pytest.mark.parametrize("what", ["seen", "norms", "last", "record"])
def test_what_would_be_forgotten_at_a_restart_is_refused(
    tmp_path: Path, recipe: MakeRecipe, own: str, what: str
) -> None:
    with pytest.raises(RunError, match=f"Remembering remembers '{what}', which is no list and no mapping of arrays"):
        federate(tmp_path / "run", recipe(own + "Remembering", arguments={"what": what}), dict(sites()))


def test_a_state_of_the_round_before_is_remembered_and_may_be_written_to(
    tmp_path: Path, recipe: MakeRecipe, own: str
) -> None:
    federate(tmp_path / "run", recipe(own + "HeavyBall"), dict(sites()))
    x, before, reached = 0.0, None, []
    for _ in range(4):
        mean = x + 2.75
        x = mean if before is None else 1.5 * mean - 0.5 * before
        before = mean
        reached.append(x)
    np.testing.assert_allclose(states(tmp_path / "run"), reached, rtol=1e-6)


def test_a_strategy_that_asks_its_sites_for_more_is_refused(tmp_path: Path, recipe: MakeRecipe) -> None:
    with pytest.raises(RunError, match=r"FedProx asks its sites for 'proximal-mu'.*aggregation.proximal_mu"):
        federate(tmp_path / "run", recipe(FLOWERS + "FedProx", arguments={"proximal_mu": 0.1}), dict(sites()))


def test_a_strategy_that_fails_is_named(tmp_path: Path, recipe: MakeRecipe, own: str) -> None:
    with pytest.raises(RunError, match=r"aggregation\.flower: Failing fails: KeyError: 'weights'"):
        federate(tmp_path / "run", recipe(own + "Failing"), dict(sites()))


@pytest.mark.parametrize(
    ("strategy", "arguments", "said"),
    [
        ("no_such_module:Any", {}, "no_such_module"),
        (FLOWERS + "FedNone", {}, "FedNone"),
        ("json:JSONDecoder", {}, "is no flwr.serverapp.strategy.Strategy"),
        (FLOWERS + "FedAvg", {"betta": 1}, r"aggregation.flower.arguments: FedAvg: .*betta"),
    ],
)
def test_what_is_no_strategy_is_refused(
    tmp_path: Path, recipe: MakeRecipe, strategy: str, arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        federate(tmp_path / "run", recipe(strategy, arguments=arguments), dict(sites()))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"aggregation": {"flower": {}}}, r"aggregation.flower.strategy: rule 'flower' needs it"),
        ({"aggregation": {"flower": {"strategy": "not a path"}}}, "aggregation.flower.strategy"),
        ({"aggregation": {"outer": {"step": "adam"}}}, "rule 'flower' takes steps of its own"),
        ({"aggregation": {"adapters": "rolora"}}, "what rule 'flower' remembers may move a factor"),
        ({"privacy": {"codec": "ring16"}}, "rule 'flower' needs each site's state by itself"),
        ({"topology": {"kind": "gossip"}}, "'flower' is a server's"),
    ],
)
def test_a_recipe_in_which_no_strategy_can_be_is_refused(make_recipe: MakeRecipe, sections: Any, said: str) -> None:
    aggregation = {"rule": "flower", "flower": {"strategy": FLOWERS + "FedAvg"}, **sections.get("aggregation", {})}
    topology = {"kind": "federated", "rounds": 2, "local_steps": 1, **sections.get("topology", {})}
    with pytest.raises(InputError, match=said):
        make_recipe(**{**sections, "aggregation": aggregation, "topology": topology})
