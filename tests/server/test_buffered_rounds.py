"""Asynchronous rounds: who is in which, what an update from an earlier state counts, and that nothing is lost."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core_training.foundation.errors import InputError
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.run_folder import RunFolder
from flower_transport.in_process import InProcessGrid
from flower_transport.reply import Reply
from server.round_loop import run_federation
from server.run_store import RunStore
from strategies.messages import Envelope
from tests.failing_sites import federate as federate_trained
from tests.server.arithmetic_sites import ArithmeticSite, federate

MakeRecipe = Callable[..., Recipe]
NUMBERS = {"a": 1.0, "b": 2.0, "c": 4.0, "d": 8.0, "e": 16.0}


class Killed(BaseException):
    pass


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> MakeRecipe:
    def make(buffer: int | None = 2, rounds: int = 7, **topology: Any) -> Recipe:
        topology = {"kind": "federated", "rounds": rounds, "local_steps": 1, "buffer": buffer, **topology}
        return make_recipe(topology=topology, aggregation={"weights": "equal"})

    return make


def sites(names: Sequence[str] = "abc") -> dict[str, Any]:
    return {name: ArithmeticSite(NUMBERS[name], 1) for name in names}


def worked_out(names: Sequence[str], buffer: int, rounds: int, power: float) -> tuple[float, list[dict[str, int]]]:
    """The value that rounds lead to, and how stale each site was in each, where whoever waits longest answers first."""
    value, at_work, in_rounds = 0.0, deque[tuple[str, int]](), []
    for number in range(1, rounds + 1):
        waiting = {name for name, _ in at_work}
        at_work.extend((name, number) for name in names if name not in waiting)
        taken = [at_work.popleft() for _ in range(buffer)]
        in_rounds.append({name: number - began for name, began in taken})
        value += np.mean([NUMBERS[name] * (1 + number - began) ** -power for name, began in taken])
    return value, in_rounds


def staleness(run: Path) -> list[dict[str, Any]]:
    """How stale each site was in each round."""
    return [{site: part["stale"] for site, part in line["sites"].items()} for line in RunFolder(run).lines("round")]


@pytest.mark.parametrize("power", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(("names", "buffer"), [("abc", 2), ("abcde", 2), ("abcde", 3), ("ab", 1), ("abc", 3)])
def test_a_round_is_of_the_first_that_answer_from_wherever_they_began(
    tmp_path: Path, recipe: MakeRecipe, names: str, buffer: int, power: float
) -> None:
    federate(tmp_path / "run", recipe(buffer, stale_power=power), sites(names))
    value, in_rounds = worked_out(names, buffer, 7, power)
    assert staleness(tmp_path / "run") == in_rounds
    np.testing.assert_allclose(_last(tmp_path / "run"), value, rtol=1e-6)


def test_a_buffer_of_all_sites_is_a_run_that_waits_for_all(tmp_path: Path, recipe: MakeRecipe) -> None:
    whole = federate(tmp_path / "all", recipe(3), sites())
    waiting = federate(tmp_path / "sync", recipe(None), sites())
    assert whole.state_digest == waiting.state_digest


@pytest.mark.parametrize("killed_after", [1, 2, 4])
def test_a_server_that_was_killed_asks_those_at_work_for_the_same(
    tmp_path: Path, recipe: MakeRecipe, killed_after: int
) -> None:
    def kill(number: int, loss: float | None) -> None:
        if number == killed_after:
            raise Killed

    wanted, answers, orders = recipe(), sites(), list[tuple[str, int]]()
    whole = federate(tmp_path / "whole", wanted, sites())
    nodes = dict(enumerate(answers, start=1))
    RunFolder(tmp_path / "run").prepare(wanted, resume=False)
    grid = InProcessGrid(lambda order, node: answers[nodes[node]](order), nodes)
    with pytest.raises(Killed):
        run_federation(grid, tmp_path / "run", lambda: nodes, kill, in_process=True)
    at_work = RunStore(RunFolder(tmp_path / "run")).latest()[0].at_work  # type: ignore[index]

    def noting(name: str) -> Callable[[Envelope], Envelope]:
        def answer(order: Envelope) -> Envelope:
            if order.kind == "train":
                orders.append((name, order.fields["round"]))
            return answers[name](order)

        return answer

    resumed = federate(tmp_path / "run", wanted, {name: noting(name) for name in answers})
    assert len(at_work) == 1
    assert orders[0] == next(iter(at_work.items()))
    assert [dict(event.sites) for event in RunFolder(tmp_path / "run").events(events.AskedAgain)] == [at_work]
    assert resumed.state_digest == whole.state_digest
    assert staleness(tmp_path / "run") == staleness(tmp_path / "whole")


def test_an_update_from_too_long_ago_is_left_out_with_its_reason(tmp_path: Path, recipe: MakeRecipe) -> None:
    federate(tmp_path / "run", recipe(1, rounds=4, most_stale=0), sites("ab"))
    assert all(part == 0 for taken in staleness(tmp_path / "run") for part in taken.values())
    said = [event.reason for event in RunFolder(tmp_path / "run").events(events.Quarantined)]
    assert said
    assert all("1 rounds have passed since the start of its update" in reason for reason in said)


def test_who_is_at_work_when_a_run_ends_is_told(tmp_path: Path, recipe: MakeRecipe) -> None:
    federate(tmp_path / "run", recipe(2, rounds=1), sites())
    assert [event.sites for event in RunFolder(tmp_path / "run").events(events.NotAwaited)] == [["c"]]


class ThreadedGrid:
    """A grid whose nodes work side by side, each as long as `seconds` says of it."""

    def __init__(self, handle: Callable[[Envelope, int], Envelope], seconds: Mapping[int, float]) -> None:
        self._handle, self._seconds = handle, seconds
        self._locks = {node: threading.Lock() for node in seconds}
        self._answers: dict[str, Envelope] = {}
        self._sent = 0

    def nodes(self) -> list[int]:
        return list(self._seconds)

    def allow_payloads(self, payload_bytes: int) -> None:
        pass

    def send(self, envelopes: Mapping[int, Envelope], ttl: float) -> dict[str, int]:
        sent = {}
        for node, envelope in envelopes.items():
            self._sent += 1
            sent[str(self._sent)] = node
            threading.Thread(target=self._work, args=(str(self._sent), node, envelope), daemon=True).start()
        return sent

    def _work(self, message: str, node: int, envelope: Envelope) -> None:
        with self._locks[node]:
            if envelope.kind == "train":
                time.sleep(self._seconds[node])
            self._answers[message] = self._handle(envelope, node)

    def replies(self, orders: Sequence[str], patience: float) -> Iterator[Reply]:
        until = time.monotonic() + patience
        while not (there := [order for order in orders if order in self._answers]) and time.monotonic() < until:
            time.sleep(0.002)
        for order in there:
            yield Answered(order, self._answers.pop(order))


class Answered(Reply):
    def __init__(self, order: str, envelope: Envelope) -> None:
        super().__init__(order, "")
        self._envelope = envelope

    def envelope(self) -> Envelope:
        return self._envelope


def test_fast_sites_do_not_wait_for_a_slow_one_and_its_work_counts(tmp_path: Path, recipe: MakeRecipe) -> None:
    answers, nodes = sites(), dict(enumerate("abc", start=1))
    RunFolder(tmp_path / "run").prepare(recipe(rounds=9), resume=False)
    grid = ThreadedGrid(lambda order, node: answers[nodes[node]](order), {1: 0.05, 2: 0.05, 3: 0.4})
    run_federation(grid, tmp_path / "run", lambda: nodes)
    parts = Counter(site for taken in staleness(tmp_path / "run") for site in taken)
    assert parts["a"] > 2 * parts["c"]
    assert max(stale for taken in staleness(tmp_path / "run") for stale in taken.values()) >= 2
    assert 1 <= parts["c"] <= 4


@pytest.mark.parametrize("aggregation", [{}, {"rule": "median"}, {"outer": {"step": "momentum", "momentum": 0.5}}])
@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_models_learn_in_buffers(
    tmp_path: Path, make_recipe: MakeRecipe, site_files: list[Path], codec: str, aggregation: dict[str, Any]
) -> None:
    wanted = make_recipe(
        simulation={"sites": [str(path) for path in site_files]},
        topology={"kind": "federated", "rounds": 6, "local_steps": 2, "buffer": 2},
        aggregation=aggregation,
        privacy={"codec": codec},
    )
    summary = federate_trained(wanted, tmp_path / "run", lambda *_: None)
    assert summary.status == "completed"
    assert summary.eval_loss is not None
    assert summary.eval_loss_initial is not None
    assert summary.eval_loss < summary.eval_loss_initial
    assert {stale for taken in staleness(tmp_path / "run") for stale in taken.values()} == {0, 1}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"topology": {"kind": "gossip"}}, r"topology.buffer: it is a server that gathers updates"),
        ({"topology": {"minimum_sites": 3}}, r"topology.buffer: 2 is less than topology.minimum_sites, 3"),
        ({"topology": {"sites_per_round": 2}}, r"buffer: all sites work"),
        ({"topology": {"judged_by": ["a"]}}, r"topology.judged_by: a buffer may have none"),
        ({"privacy": {"secure_aggregation": True}}, r"topology.buffer: 2 is less than privacy.secure_aggregation"),
        (
            {"aggregation": {"scaffold": True}, "training": {"optim": "sgd", "learning_rate": 0.1}},
            r"topology.buffer: SCAFFOLD",
        ),
        (
            {
                "aggregation": {"outer": {"step": "feddyn"}, "weights": "equal"},
                "training": {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0},
            },
            r"topology.buffer: FedDyn",
        ),
        ({"aggregation": {"rule": "flexlora"}, "tuning": {"mode": "lora"}}, r"topology.buffer: rule 'flexlora' makes"),
        ({"aggregation": {"adapters": "fedsvd"}, "tuning": {"mode": "lora"}}, r"topology.buffer: adapters 'fedsvd'"),
        ({"aggregation": {"rule": "flower", "flower": {"strategy": "flwr.serverapp.strategy:FedAvg"}}}, r"'flower'"),
    ],
)
def test_what_does_not_go_with_a_buffer_is_refused(make_recipe: MakeRecipe, sections: Any, said: str) -> None:
    topology = {"kind": "federated", "rounds": 2, "buffer": 2, **sections.pop("topology", {})}
    with pytest.raises(InputError, match=said):
        make_recipe(topology=topology, **sections)


def _last(run: Path) -> Any:
    committed = RunStore(RunFolder(run)).latest()
    assert committed is not None
    return committed[1].buffer
