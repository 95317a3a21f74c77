"""Who joins a run, and who is asked again: sites that refuse for the moment, for good, or are slow."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from core_training.foundation.errors import RunError
from core_training.recipe.schema import Recipe
from core_training.runs.events import WaitingForSites
from core_training.runs.run_folder import RunFolder
from flower_transport.in_process import InProcessGrid
from server import membership
from server.round_loop import run_federation
from strategies.messages import Envelope, JoinReply, Refusal
from tests.server.arithmetic_sites import ArithmeticSite, events, federate


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    return lambda **topology: make_recipe(
        topology={"kind": "federated", "rounds": 3, "local_steps": 1, "round_deadline": 60, **topology}
    )


class ReluctantSite(ArithmeticSite):
    """Refuses to join so many times; `asked` is when it was asked to."""

    def __init__(self, refusals: int, fatal: bool = False) -> None:
        super().__init__(1.0, 10)
        self.refusals = refusals
        self.fatal = fatal
        self.asked: list[float] = []

    def __call__(self, order: Envelope) -> Envelope:
        if order.kind == "join":
            self.asked.append(time.monotonic())
            if len(self.asked) <= self.refusals:
                return Refusal(reason="the worker is starting", fatal=self.fatal).envelope()
        return super().__call__(order)


def test_a_site_that_cannot_join_yet_is_asked_again_ever_later_until_it_joins(
    tmp_path: Path, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "_ASKED_AGAIN_AFTER", 0.3)
    monkeypatch.setattr(membership, "_ASKED_AGAIN_AT_MOST", 1.0)
    site = ReluctantSite(refusals=4)
    summary = federate(
        tmp_path / "run", recipe(minimum_sites=2), {"a": ArithmeticSite(1.0, 10), "b": site}, in_process=False
    )
    assert summary.sites["b"].rounds == 3
    gaps = [later - earlier for earlier, later in pairwise(site.asked)]
    assert all(gap >= least for gap, least in zip(gaps, [0.3, 0.6, 1.0, 1.0], strict=True))
    assert gaps[-1] < 1.8  # no longer than the longest pause, and a look


@pytest.mark.parametrize(("fatal", "in_process"), [(True, False), (False, True)])
def test_a_site_is_asked_once_when_it_refuses_for_good_or_in_a_simulation(
    tmp_path: Path, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, fatal: bool, in_process: bool
) -> None:
    monkeypatch.setattr(membership, "_ASKED_AGAIN_AFTER", 0.0)
    site = ReluctantSite(refusals=1, fatal=fatal)
    summary = federate(tmp_path / "run", recipe(), {"a": ArithmeticSite(1.0, 10), "b": site}, in_process=in_process)
    assert len(site.asked) == 1
    assert summary.sites.keys() == {"a"}


def test_a_site_with_other_terms_is_asked_once(
    tmp_path: Path, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "_ASKED_AGAIN_AFTER", 0.0)
    other = ReluctantSite(refusals=0)

    def differs(order: Envelope) -> Envelope:
        reply = other(order)
        return Envelope.of(reply.kind, {**reply.fields, "initial_digest": "f" * 64})

    sites = {"a": ArithmeticSite(1.0, 10), "b": ArithmeticSite(1.0, 10), "other": differs}
    federate(tmp_path / "run", recipe(), sites, in_process=False)
    assert len(other.asked) == 1


@pytest.mark.parametrize(("within", "rounds"), [(30.0, [3]), (0.0, [1, 2])])
def test_a_server_that_was_started_again_waits_for_those_who_took_part_though_enough_are_there(
    tmp_path: Path, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, within: float, rounds: list[int]
) -> None:
    monkeypatch.setattr(membership, "_RETURNS_WITHIN", within)
    sites = {"a": ArithmeticSite(1.0, 10), "b": ArithmeticSite(1.0, 10)}

    class Killed(BaseException):
        """Stands for SIGKILL."""

    def dies(order: Envelope) -> Envelope:
        if order.kind == "train" and order.fields["round"] == 2:
            raise Killed
        return ArithmeticSite(1.0, 10)(order)

    with pytest.raises(Killed):
        federate(tmp_path / "run", recipe(rounds=3), {**sites, "c": dies}, in_process=False)
    nodes, looks = InProcessGrid.nodes, list[int]()

    def without_c_at_first(grid: InProcessGrid) -> list[int]:
        looks.append(1)
        return [node for node in nodes(grid) if node != 3 or len(looks) > 4]

    monkeypatch.setattr(InProcessGrid, "nodes", without_c_at_first)
    everyone = {**sites, "c": ArithmeticSite(1.0, 10)}
    summary = federate(tmp_path / "run", recipe(rounds=3), everyone, in_process=False)
    assert summary.sites["c"].rounds in rounds


@pytest.mark.parametrize("within", [30.0, 0.0])
def test_a_site_that_is_away_for_a_moment_at_the_end_gets_the_result_though_enough_are_there(
    tmp_path: Path, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, within: float
) -> None:
    monkeypatch.setattr(membership, "_RETURNS_WITHIN", within)
    nodes, looks = InProcessGrid.nodes, list[int]()

    def without_c_after_the_rounds(grid: InProcessGrid) -> list[int]:
        if len(list(events(tmp_path / "run", "round"))) == 3:
            looks.append(1)
        return [node for node in nodes(grid) if node != 3 or not 0 < len(looks) < 4]

    monkeypatch.setattr(InProcessGrid, "nodes", without_c_after_the_rounds)
    sites = {name: ArithmeticSite(1.0, 10) for name in ("a", "b", "c")}
    summary = federate(tmp_path / "run", recipe(rounds=3), sites, in_process=False)
    assert (summary.sites["c"].eval_loss is not None) == (within > 0)
    assert summary.sites["c"].rounds == 3


def test_a_newcomer_that_is_slow_to_join_does_not_hold_up_the_rounds(
    tmp_path: Path, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "_ASKED_AGAIN_AFTER", 0.0)
    monkeypatch.setattr(membership, "_NEWCOMER_WAIT", 0.3)
    pull = InProcessGrid.replies
    slow = ReluctantSite(refusals=1)

    def withhold(grid: InProcessGrid, identifiers: Any, patience: float) -> Any:
        silent = {i for i, message in grid._pending.items() if message.metadata.dst_node_id == 2 and slow.asked}
        if silent.issuperset(identifiers):
            time.sleep(patience)
        return pull(grid, [i for i in identifiers if i not in silent], patience)

    monkeypatch.setattr(InProcessGrid, "replies", withhold)
    began = time.monotonic()
    summary = federate(tmp_path / "run", recipe(), {"a": ArithmeticSite(1.0, 10), "b": slow}, in_process=False)
    assert time.monotonic() - began < 20  # of a deadline of 60
    assert summary.rounds == 3
    assert {event["site"] for event in events(tmp_path / "run", "late")} == {"b"}


class LayoutSite(ArithmeticSite):
    """Sends a layout of its own."""

    def __init__(self, layout: dict[str, str]) -> None:
        super().__init__(1.0, 10)
        self.sent = layout

    def __call__(self, order: Envelope) -> Envelope:
        answer = super().__call__(order)
        if order.kind == "join":
            return JoinReply.open(answer).model_copy(update={"layout": self.sent}).envelope()
        return answer


def buffers(**named: Any) -> dict[str, str]:
    return {"config.json": "{}", "buffers.json": json.dumps(named)}


BIAS = {"dtype": "float32", "shape": [2], "values": [0.5, 1.5]}


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (buffers(**{"layer.a": BIAS}), "names a trained tensor"),
        (buffers(__metadata__=BIAS), "names a trained tensor"),
        (buffers(bias={**BIAS, "shape": [3]}), "buffers.json is damaged"),
        (buffers(bias={**BIAS, "values": [9.0, 9.0]}), "starts from something else"),
        ({"config.json": "{}", "buffers.json": "{"}, "buffers.json is damaged"),
    ],
)
def test_a_site_whose_buffers_are_not_those_of_the_others_is_turned_away(
    tmp_path: Path, recipe: Callable[..., Recipe], odd: dict[str, str], reason: str
) -> None:
    """They would stand beside the trained tensors in the result."""
    sites = {"a": LayoutSite(odd), **{name: LayoutSite(buffers(bias=BIAS)) for name in ("b", "c")}}
    summary = federate(tmp_path / "run", recipe(minimum_sites=2), sites)
    assert set(summary.sites) == {"b", "c"}
    (turned_away,) = events(tmp_path / "run", "quarantined")
    assert (turned_away["site"], reason in turned_away["reason"]) == ("a", True)


class OtherSite(ArithmeticSite):
    """Announces something of its own in one field."""

    def __init__(self, **announced: Any) -> None:
        super().__init__(100.0, 10)
        self.announced = announced

    def __call__(self, order: Envelope) -> Envelope:
        answer = super().__call__(order)
        if order.kind == "join":
            return JoinReply.open(answer).model_copy(update=self.announced).envelope()
        return answer


ODD: dict[str, dict[str, Any]] = {
    "another start": {"initial_digest": "f" * 64},
    "another initial state": {"initial_state_digest": "f" * 64},
    "another reading of the recipe": {"recipe_digest": "f" * 64},
    "other tensors": {"manifest": [["layer.a", [2, 3]]]},
    "other scaling of the adapter": {"layout": {"adapter_config.json": '{"lora_alpha": 4096}'}},
    "no files": {"layout": {}},
}


@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize("odd", ODD)
def test_who_connects_first_does_not_decide_what_the_run_is(
    tmp_path: Path, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, odd: str, first: int
) -> None:
    honest = {"b": ArithmeticSite(1.0, 10), "c": ArithmeticSite(1.0, 10)}
    nodes, looks = InProcessGrid.nodes, list[int]()

    def one_after_the_other(grid: InProcessGrid) -> list[int]:
        looks.append(1)
        return sorted(nodes(grid), key=lambda node: (node - first) % 3)[: len(looks)]

    monkeypatch.setattr(InProcessGrid, "nodes", one_after_the_other)
    sites = {"a": OtherSite(**ODD[odd]), **honest}
    summary = federate(tmp_path / "run", recipe(minimum_sites=2, rounds=1), sites, in_process=False)
    assert {name: part.rounds for name, part in summary.sites.items()} == {"b": 1, "c": 1}
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").read_text() == "{}"
    (turned_away,) = events(tmp_path / "run", "quarantined")
    assert turned_away["site"] == "a"
    assert "differ" in turned_away["reason"]


def test_the_files_of_the_result_are_those_that_most_sites_announce_and_the_odd_one_is_told_what_differs(
    tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    files = {"adapter_config.json": '{"lora_alpha": 8, "r": 4}'}
    sites = {
        "a": LayoutSite({"adapter_config.json": '{"lora_alpha": 4096, "r": 4}'}),
        **{name: LayoutSite(files) for name in ("b", "c")},
    }
    federate(tmp_path / "run", recipe(minimum_sites=2), sites)
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["lora_alpha"] == 8
    (turned_away,) = events(tmp_path / "run", "quarantined")
    assert "in other words than the others (adapter_config.json: lora_alpha)" in turned_away["reason"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"auto_map": {"AutoConfig": "evil.Evil"}}', "names code to be run"),
        ("[" * 100_000, "is not a JSON object"),
        ("[]", "is not a JSON object"),
    ],
)
def test_files_that_would_run_code_or_are_no_files_of_a_result_have_no_vote(
    tmp_path: Path, recipe: Callable[..., Recipe], content: str, reason: str
) -> None:
    sites = {"a": LayoutSite({"config.json": content}), "b": ArithmeticSite(1.0, 10)}
    summary = federate(tmp_path / "run", recipe(), sites)
    assert set(summary.sites) == {"b"}
    (turned_away,) = events(tmp_path / "run", "quarantined")
    assert reason in turned_away["reason"]


@pytest.mark.parametrize("in_process", [True, False])
def test_without_a_majority_the_run_ends_at_once_and_says_who_announced_what(
    tmp_path: Path, recipe: Callable[..., Recipe], in_process: bool
) -> None:
    sites = {
        **{name: ArithmeticSite(1.0, 10) for name in ("a", "b")},
        **{name: OtherSite(initial_digest="f" * 64) for name in ("c", "d")},
    }
    began = time.monotonic()
    with pytest.raises(RunError, match=r"no more than half .*: a, b: start [0-9a-f]{8}; c, d: start [0-9a-f]{8}; what"):
        federate(tmp_path / "run", recipe(minimum_sites=2), sites, in_process=in_process)
    assert time.monotonic() - began < 20  # of a deadline of 60
    assert not list((tmp_path / "run" / "checkpoints").glob("round-*"))


def test_a_tie_is_told_and_waits_for_the_site_that_decides_it(
    tmp_path: Path, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = InProcessGrid.nodes
    run = tmp_path / "run"
    monkeypatch.setattr(
        InProcessGrid, "nodes", lambda grid: [n for n in nodes(grid) if n != 3 or events(run, "undecided")]
    )
    sites = {"a": OtherSite(initial_digest="f" * 64), **{name: ArithmeticSite(1.0, 10) for name in ("b", "c")}}
    summary = federate(run, recipe(minimum_sites=2, rounds=1), sites, in_process=False)
    assert set(summary.sites) == {"b", "c"}
    (undecided,) = events(run, "undecided")
    assert undecided["announced"].startswith("a: start ")
    assert RunFolder(run).status().newest is not None


def no_such_model(order: Envelope) -> Envelope:
    return Refusal(reason="model.name_or_path: no model 'big' here", fatal=True).envelope()


def test_a_run_that_too_few_admitted_sites_can_serve_ends_at_once_with_their_reasons(
    tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    sites = {"a": ArithmeticSite(1.0, 10), "b": no_such_model, "c": no_such_model}
    with pytest.raises(RunError, match="2 of the 3 admitted sites cannot serve this run, which needs 2") as ended:
        federate(tmp_path / "run", recipe(minimum_sites=2, round_deadline=3600), sites, in_process=False)
    for site in ("b", "c"):
        assert f"{site}: model.name_or_path: no model 'big' here" in str(ended.value)


def test_while_a_run_waits_it_is_told_again_and_again_who_could_not_join_and_why(
    tmp_path: Path, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "_TOLD_AGAIN_AFTER", 0.5)
    run = RunFolder(tmp_path / "run")
    run.prepare(recipe(minimum_sites=2, round_deadline=2), resume=False)
    answers = {1: ArithmeticSite(1.0, 10), 2: no_such_model}
    grid = InProcessGrid(lambda order, node: answers[node](order), answers)
    admitted = {1: "a", 2: "b", 3: "away"}
    with pytest.raises(RunError, match="1 of at least 2 sites were ready"):
        run_federation(grid, run.path, lambda: admitted)
    told = [event.note for event in run.events(WaitingForSites)]
    assert len(told) >= 3
    assert set(told) == {
        "waiting for 2 sites, 1 are there; b could not join: model.name_or_path: no model 'big' here; "
        "not connected: away"
    }
    assert run.status().state == "waiting"


def test_sites_that_no_longer_fit_what_a_run_has_committed_are_told_so_at_once(
    tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    def breaks_off(order: Envelope) -> Envelope:
        if order.kind == "train" and order.fields["round"] == 2:
            raise KeyboardInterrupt
        return ArithmeticSite(1.0, 10)(order)

    settings = recipe(minimum_sites=2, rounds=3, round_deadline=3600)
    with pytest.raises(KeyboardInterrupt):
        federate(tmp_path / "run", settings, {"a": ArithmeticSite(1.0, 10), "b": breaks_off}, in_process=False)
    others = {name: OtherSite(initial_digest="f" * 64) for name in ("a", "b")}
    with pytest.raises(
        RunError, match=r"2 of the 2 admitted sites cannot serve this run.*a: the site starts from something else"
    ):
        federate(tmp_path / "run", settings, others, in_process=False)


def test_a_run_that_waited_for_sites_trains_when_they_have_come(
    tmp_path: Path, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes, looks, states = InProcessGrid.nodes, list[int](), list[str]()
    run = tmp_path / "run"

    def one_after_the_other(grid: InProcessGrid) -> list[int]:
        looks.append(1)
        return nodes(grid)[: len(looks)]

    def site(order: Envelope) -> Envelope:
        if order.kind == "train":
            states.append(RunFolder(run).status().state)
        return ArithmeticSite(1.0, 10)(order)

    monkeypatch.setattr(InProcessGrid, "nodes", one_after_the_other)
    federate(run, recipe(minimum_sites=2, rounds=1), {"a": site, "b": site}, in_process=False)
    assert states == ["training", "training"]
