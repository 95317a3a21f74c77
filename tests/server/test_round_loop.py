"""The server's round loop against sites that answer well, badly, late or not at all.

The sites are arithmetic (see `arithmetic_sites`), so the right aggregate is known by heart.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.update_writer import TrainedSlice, UpdateWriter
from core_training import __version__
from core_training.foundation.errors import ProtocolError, RunError
from core_training.foundation.state import TrainableState
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from flower_transport.in_process import InProcessGrid
from server.run_store import RunStore
from strategies.messages import Envelope, TrainOrder, Update
from tests.server.arithmetic_sites import MANIFEST, START, Answer, ArithmeticSite, SiteWithAnAim, events, federate

MOST = 1 * 4 * 64
"""The loss tokens of 1 step of 4 rows of 64 tokens, in the one process that the sites announce."""


def with_fields(**changes: Any) -> Callable[[Envelope], Envelope]:
    return lambda update: Envelope.of(update.kind, {**update.fields, **changes}, update.payload)


def with_weight(weight: float, units: int) -> Callable[[Envelope], Envelope]:
    return lambda update: with_fields(weight=weight, train={**update.fields["train"], "weight": units})(update)


def with_payload(tensors: dict[str, Any] | bytes) -> Callable[[Envelope], Envelope]:
    from safetensors.numpy import save

    payload = tensors if isinstance(tensors, bytes) else save({k: np.asarray(v) for k, v in tensors.items()})
    return lambda update: Envelope(update.kind, update.text, payload)


def raises(update: Envelope) -> Envelope:
    raise ProtocolError("the disk is full")


def crashes(update: Envelope) -> Envelope:
    raise ZeroDivisionError("a defect at the site")


A, B = np.zeros((2, 3), dtype=np.float32), np.zeros(4, dtype=np.float32)
FAULTS: dict[str, tuple[Callable[[Envelope], Envelope], str]] = {
    "exception": (raises, "the disk is full"),
    "defect": (crashes, "ZeroDivisionError: a defect at the site"),
    "unknown tensor": (with_payload({"layer.a": A, "layer.c": B}), "unknown tensor 'layer.c'"),
    "missing tensor": (with_payload({"layer.a": A}), "tensor 'layer.b' is missing"),
    "wrong shape": (with_payload({"layer.a": A.T, "layer.b": B}), "'layer.a' is float32 (3, 2)"),
    "wrong dtype": (with_payload({"layer.a": A.astype(np.float64), "layer.b": B}), "'layer.a' is float64"),
    "NaN": (with_payload({"layer.a": A * np.nan, "layer.b": B}), "NaN or infinite"),
    "infinite": (with_payload({"layer.a": A + np.inf, "layer.b": B}), "NaN or infinite"),
    "garbage": (with_payload(b"\x00" * 64), "not a safetensors file"),
    "too large": (with_payload(b"\x00" * 100_000), "more than a state"),
    "no tensors": (with_payload(b""), "not a safetensors file"),
    "weight zero": (with_weight(0.0, 0), "weight 0.0"),
    "weight negative": (with_fields(weight=-5.0), "weight -5.0"),
    "weight NaN": (with_fields(weight=float("nan")), "NaN is no number there"),
    "weight absurd": (with_fields(weight=1e30), "weight 1e+30"),
    "weight other than reported": (with_fields(weight=201.0), "weight 201.0 is not that of its report, 200"),
    "weight plausible, but more than the steps allow": (
        with_weight(MOST + 1.0, MOST + 1), f"more than 1 steps can have, {MOST}"),
    "tokens more than the steps allow": (
        lambda update: with_fields(train={**update.fields["train"], "tokens": 10**9})(update), "1000000000 tokens are"),
    "held-out loss of more records than it announced": (
        with_fields(evaluation={"loss_sum": 1e9, "weight": 1, "examples": 3}), "it announced 2 held-out records"),
    "held-out loss of more tokens than its records have": (
        with_fields(evaluation={"loss_sum": 1e9, "weight": 10**12, "examples": 2}), "it announced 2 held-out records"),
    "finite, and far beyond training": (
        with_payload({"layer.a": A + np.float32(3.4e38), "layer.b": B}), "the change has norm 8.328e+38, and 316.2 is"),
    "one value far beyond training": (
        with_payload({"layer.a": A, "layer.b": B + np.eye(4, dtype=np.float32)[0] * np.float32(1e3)}), "norm 99"),
    "stale round": (with_fields(round=1), "of round 1"),
    "other run": (with_fields(run_id="other"), "belongs to run other"),
    "other manifest": (with_fields(manifest_digest="f" * 64), "another manifest"),
    "loss NaN": (with_fields(train={"steps": 1, "loss_first": float("nan"), "loss_last": 1.0, "loss_mean": 1.0,
                                    "weight": 1, "tokens": 1, "seconds": 0.0}), "NaN is no number there"),
    "unknown field": (with_fields(admin=True), "admin"),
    "field missing": (lambda update: Envelope.of(update.kind, {}, update.payload), "Field required"),
    "other kind": (lambda update: Envelope.of("joined", update.fields, b""), "'joined' message came"),
}  # fmt: skip


def final_state(folder: Path) -> TrainableState:
    committed = RunStore(RunFolder(folder)).latest()
    assert committed is not None
    return committed[1]


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    return lambda **topology: make_recipe(topology={"kind": "federated", "rounds": 3, "local_steps": 1, **topology})


def test_state_is_the_mean_weighted_by_units(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    sites = {"a": ArithmeticSite(1.0, 10), "b": ArithmeticSite(4.0, 20)}
    summary = federate(tmp_path / "run", recipe(), sites)
    np.testing.assert_allclose(final_state(tmp_path / "run").buffer, 3 * (1 * 10 + 4 * 20) / 30)
    assert summary.rounds == 3
    assert {name: site.rounds for name, site in summary.sites.items()} == {"a": 3, "b": 3}
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_reply_is_set_aside_with_name_and_reason_and_the_round_goes_on(
    tmp_path: Path, recipe: Callable[..., Recipe], fault: str
) -> None:
    spoil, reason = FAULTS[fault]
    honest = ArithmeticSite(7.0, 200)

    def bad(order: Envelope) -> Envelope:
        reply = honest(order)
        return spoil(reply) if order.kind == "train" and order.fields["round"] == 2 else reply

    sites: dict[str, Answer] = {"a": ArithmeticSite(1.0, 10), "b": ArithmeticSite(4.0, 20), "bad": bad}
    federate(tmp_path / "run", recipe(rounds=2), sites)
    (quarantined,) = events(tmp_path / "run", "quarantined")
    assert (quarantined["site"], quarantined["round"]) == ("bad", 2)
    assert reason in quarantined["reason"]
    first = (1 * 10 + 4 * 20 + 7 * 200) / 230
    np.testing.assert_allclose(final_state(tmp_path / "run").buffer, first + (1 * 10 + 4 * 20) / 30, rtol=1e-6)


class AnnouncedSite(ArithmeticSite):
    """Announces so many records and processes."""

    def __init__(self, number: float, weight: int, records: int, processes: int) -> None:
        super().__init__(number, weight)
        self.records, self.processes = records, processes

    def __call__(self, order: Envelope) -> Envelope:
        answer = super().__call__(order)
        if order.kind != "join":
            return answer
        data = {**answer.fields["data"], "train_examples": self.records}
        return Envelope.of(answer.kind, {**answer.fields, "data": data, "processes": self.processes})


@pytest.mark.parametrize(
    ("records", "processes", "most"),
    [(10, 1, 4 * 64), (3, 1, 3 * 64), (1000, 2, 9 * 64), (1000, 64, (4 * 64 + 63) * 64), (1, 2, 4 * 64)],
)
def test_a_site_weighs_no_more_than_what_it_announced_allows(
    tmp_path: Path, recipe: Callable[..., Recipe], records: int, processes: int, most: int
) -> None:
    sites = {
        "a": ArithmeticSite(1.0, 10),
        "honest": AnnouncedSite(1.0, most, records, processes),
        "greedy": AnnouncedSite(9.0, most + 1, records, processes),
    }
    federate(tmp_path / "run", recipe(rounds=1), sites)
    np.testing.assert_array_equal(final_state(tmp_path / "run").buffer, 1.0)
    (quarantined,) = events(tmp_path / "run", "quarantined")
    said = (
        f"weight {most + 1} is more than 1 steps can have, {most}: it announced {records} records and {processes} pro"
    )
    assert quarantined["site"] == "greedy"
    assert said in quarantined["reason"]
    assert {event["site"]: event["processes"] for event in events(tmp_path / "run", "joined")}["greedy"] == processes


def test_more_processes_than_a_site_can_have_are_announced_in_vain(
    tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    sites = {"a": ArithmeticSite(1.0, 10), "greedy": AnnouncedSite(9.0, 10, 1000, 65)}
    federate(tmp_path / "run", recipe(rounds=1), sites)
    (quarantined,) = events(tmp_path / "run", "quarantined")
    assert "processes" in quarantined["reason"]


@pytest.mark.parametrize("codec", ["fp32", "bf16", "ring16"])
def test_a_norm_that_the_recipe_names_bounds_every_update_that_the_server_sees(
    tmp_path: Path, make_recipe: Callable[..., Recipe], codec: str
) -> None:
    """Each site moves every one of 10 values by its number: the norm is √10 times that."""
    bounded = make_recipe(
        topology={"kind": "federated", "rounds": 2, "local_steps": 1},
        aggregation={"max_update_norm": 0.15},
        privacy={"codec": codec, "clip": 1.0} if codec == "ring16" else {"codec": codec},
    )
    sites = {name: CodecSite(bounded, number) for name, number in {"a": 0.03, "b": 0.04, "far": 0.055}.items()}
    federate(tmp_path / "run", bounded, dict(sites))
    np.testing.assert_allclose(final_state(tmp_path / "run").buffer, 2 * 0.035, rtol=3e-2)
    quarantined = events(tmp_path / "run", "quarantined")
    assert [(event["site"], event["round"]) for event in quarantined] == [("far", 1), ("far", 2)]
    assert all("the change has norm 0.17" in event["reason"] for event in quarantined)


class CodecSite(ArithmeticSite):
    """Writes its updates as the recipe's codec does, with the writer of a real site."""

    def __init__(self, recipe: Recipe, number: float) -> None:
        super().__init__(number, 10)
        self.writer = UpdateWriter(recipe, recipe.to_yaml(), START.digest, f"secret of {number}", None, 10, "site")

    def __call__(self, order: Envelope) -> Envelope:
        answer = super().__call__(order)
        if order.kind != "train":
            return answer
        update, train = Update.open(answer), TrainOrder.open(order)
        start = TrainableState.from_bytes(train.payload, MANIFEST) if train.payload else START
        trained = TrainableState(MANIFEST, start.buffer + np.float32(self.number))
        slice_ = TrainedSlice(start, trained, update.train, update.evaluation, start.digest)
        return self.writer.write(train, slice_, arrived=0.0, resident_seconds=0.0).envelope()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda payload: bytes(len(payload)), "is not one of updates"),
        (lambda payload: b"\x7f" * len(payload), "is not one of updates"),
        (lambda payload: payload[:-2], "bytes, not"),
    ],
)
def test_a_vector_of_a_plain_ring_that_is_none_is_set_aside_by_name_and_the_round_goes_on(
    tmp_path: Path, make_recipe: Callable[..., Recipe], spoil: Callable[[bytes], bytes], reason: str
) -> None:
    ring = make_recipe(
        topology={"kind": "federated", "rounds": 1, "local_steps": 1}, privacy={"codec": "ring16", "clip": 1.0}
    )
    honest, bad = CodecSite(ring, 0.05), CodecSite(ring, 0.05)

    def spoilt(order: Envelope) -> Envelope:
        reply = bad(order)
        return Envelope(reply.kind, reply.text, spoil(bytes(reply.payload))) if order.kind == "train" else reply

    federate(tmp_path / "run", ring, {"a": honest, "bad": spoilt})
    np.testing.assert_allclose(final_state(tmp_path / "run").buffer, 0.05, rtol=2e-2)
    (quarantined,) = events(tmp_path / "run", "quarantined")
    assert quarantined["site"] == "bad"
    assert reason in quarantined["reason"]


def test_an_evaluation_of_the_result_weighs_no_more_than_the_records_that_were_announced(
    tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    heavy = final_only(with_fields(evaluation={"loss_sum": 0.0, "weight": 10**12, "examples": 2}))
    summary = federate(tmp_path / "run", recipe(rounds=1), {"a": ArithmeticSite(1.0, 10), "b": heavy})
    assert summary.eval_loss == 1.0
    assert summary.sites["b"].eval_loss is None
    (quarantined,) = events(tmp_path / "run", "quarantined")
    assert (quarantined["site"], "held-out records" in quarantined["reason"]) == ("b", True)


def test_a_site_that_was_started_anew_on_more_records_announces_itself_again(
    tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    """Its first evaluation is of more than it had announced; from the next round on it counts."""
    honest, announced = ArithmeticSite(1.0, 10), iter([2, 5, 5, 5])

    def grown(order: Envelope) -> Envelope:
        reply = honest(order)
        if order.kind == "join":
            return with_fields(data={**reply.fields["data"], "eval_examples": next(announced)})(reply)
        if order.kind in ("train", "evaluate") and reply.fields["evaluation"]:
            return with_fields(evaluation={"loss_sum": 1.0, "weight": 1, "examples": 5})(reply)
        return reply

    every_round = recipe(rounds=3, eval_every=1)
    summary = federate(tmp_path / "run", every_round, {"a": ArithmeticSite(1.0, 10), "grown": grown})
    assert [(e["site"], e["round"]) for e in events(tmp_path / "run", "quarantined")] == [("grown", 1)]
    assert summary.sites["grown"].rounds == 2


def test_an_unknown_node_takes_no_part(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    sites = {"a": ArithmeticSite(1.0, 10), "stranger": ArithmeticSite(100.0, 10)}
    federate(tmp_path / "run", recipe(rounds=1), sites, known={1: "a"})
    np.testing.assert_array_equal(final_state(tmp_path / "run").buffer, 1.0)
    assert [e["site"] for e in events(tmp_path / "run", "quarantined")] == ["node 2"]


def test_another_version_is_refused_with_both_named(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    old = ArithmeticSite(1.0, 10)
    old.version = "0.0.9"
    federate(tmp_path / "run", recipe(rounds=1), {"a": ArithmeticSite(2.0, 10), "old": old})
    (quarantined,) = events(tmp_path / "run", "quarantined")
    assert "0.0.9" in quarantined["reason"]
    assert __version__ in quarantined["reason"]
    np.testing.assert_array_equal(final_state(tmp_path / "run").buffer, 2.0)


def test_too_few_sites_void_the_round_and_the_commit_before_stays(
    tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    site = ArithmeticSite(1.0, 10)

    def fails_in_round_2(order: Envelope) -> Envelope:
        if order.kind == "train" and order.fields["round"] == 2:
            raise ProtocolError("no disk")
        return site(order)

    sites: dict[str, Answer] = {"a": ArithmeticSite(1.0, 10), "b": fails_in_round_2}
    with pytest.raises(RunError, match="round 2: fewer than 2 sites"):
        federate(tmp_path / "run", recipe(minimum_sites=2), sites)
    assert len(events(tmp_path / "run", "void")) == 3
    np.testing.assert_array_equal(final_state(tmp_path / "run").buffer, 1.0)
    summary = federate(tmp_path / "run", recipe(minimum_sites=2), {**sites, "b": site})
    assert summary.status == "completed"
    np.testing.assert_array_equal(final_state(tmp_path / "run").buffer, 3.0)


def test_early_stop_ends_the_run_when_the_loss_no_longer_falls(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    site = ArithmeticSite(1.0, 10)
    site.losses = [3.0, 2.0, 2.5, 2.6, 0.1]
    summary = federate(tmp_path / "run", recipe(rounds=9, early_stopping_patience=2), {"a": site})
    assert summary.rounds == 4
    assert len(events(tmp_path / "run", "stopped_early")) == 1


@pytest.mark.parametrize("loss", [-1e36, 1e36])
def test_no_site_decides_alone_which_state_is_best_by_a_loss_that_nobody_has(
    tmp_path: Path, make_recipe: Callable[..., Recipe], loss: float
) -> None:
    """It is set aside by name, and the others' state that does best is the result."""
    recipe = make_recipe(
        topology={"kind": "federated", "rounds": 4, "local_steps": 1}, training={"load_best_model_at_end": True}
    )
    liar = ArithmeticSite(1.0, 10)
    liar.losses = [loss]
    sites: dict[str, Answer] = {name: SiteWithAnAim(1.0, 10, 2.2) for name in ("a", "b")}
    summary = federate(tmp_path / "run", recipe, {**sites, "liar": liar})
    assert summary.eval_loss == pytest.approx(0.2)
    assert {event["site"] for event in events(tmp_path / "run", "quarantined")} == {"liar"}
    assert all("beyond what stage sft can give" in one["reason"] for one in events(tmp_path / "run", "quarantined"))


@pytest.mark.parametrize(
    ("aim", "best", "patience"), [(2.2, 2, None), (2.2, 2, 1), (-1.0, 0, None), (9.0, 6, None), (9.0, 6, 1)]
)
def test_the_result_is_the_state_that_did_best_at_the_sites(
    tmp_path: Path, make_recipe: Callable[..., Recipe], aim: float, best: int, patience: int | None
) -> None:
    """States hold 1, 2, … after the rounds, and 0 before the first, which the server never had."""
    judged = make_recipe(
        topology={"kind": "federated", "rounds": 6, "local_steps": 1, "early_stopping_patience": patience},
        training={"load_best_model_at_end": True},
    )
    summary = federate(tmp_path / "run", judged, {"a": SiteWithAnAim(1.0, 10, aim), "b": SiteWithAnAim(1.0, 10, aim)})
    assert summary.eval_loss == pytest.approx(abs(best - aim))
    assert summary.state_digest == TrainableState(MANIFEST, np.full(MANIFEST.size, best, dtype=np.float32)).digest
    chosen = [(event["round"], event["eval_loss"]) for event in events(tmp_path / "run", "best_chosen")]
    assert chosen == ([(best, pytest.approx(abs(best - aim)))] if best < 6 else [])
    stopped = [event["round"] for event in events(tmp_path / "run", "stopped_early")]
    assert stopped == ([4] if (best, patience) == (2, 1) else [])


def test_a_servers_curve_has_each_round_with_the_loss_of_its_own_state(
    tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    summary = federate(tmp_path / "run", recipe(rounds=3), {"a": SiteWithAnAim(1.0, 10, aim=3.0)})
    rows = RunFolder(tmp_path / "run").curve()
    assert [(row["round"], row.get("loss"), row["eval_loss"]) for row in rows] == [
        (0, None, 3.0), (1, 1.0, 2.0), (2, 1.0, 1.0), (3, 1.0, 0.0),
    ]  # fmt: skip
    assert summary.curve == "curve.jsonl"


def test_a_round_goes_on_without_a_site_that_misses_the_deadline(
    tmp_path: Path, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    pull = InProcessGrid.replies

    def withhold(grid: InProcessGrid, identifiers: Any, patience: float) -> Any:
        waiting = grid._pending
        silent = {i for i, message in waiting.items() if message.metadata.dst_node_id == 2 and _is_training(message)}
        if silent.issuperset(identifiers):
            time.sleep(patience)
        return pull(grid, [i for i in identifiers if i not in silent], patience)

    monkeypatch.setattr(InProcessGrid, "replies", withhold)
    sites = {"a": ArithmeticSite(1.0, 10), "slow": ArithmeticSite(9.0, 10)}
    summary = federate(tmp_path / "run", recipe(rounds=1, round_deadline=1.0), sites)
    np.testing.assert_array_equal(final_state(tmp_path / "run").buffer, 1.0)
    assert [(e["site"], e["round"]) for e in events(tmp_path / "run", "late")] == [("slow", 1)]
    assert {name: site.rounds for name, site in summary.sites.items()} == {"a": 1, "slow": 0}


def final_only(spoil: Callable[[Envelope], Envelope], attempts: int = 3) -> Answer:
    """A site whose first `attempts` answers to the final order are spoilt."""
    site, spoilt = ArithmeticSite(1.0, 10), iter(range(attempts))

    def answer(order: Envelope) -> Envelope:
        reply = site(order)
        return spoil(reply) if order.kind == "evaluate" and next(spoilt, None) is not None else reply

    return answer


def test_the_final_evaluation_is_tried_again_until_enough_sites_have_answered(
    tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    sites: dict[str, Answer] = {"a": ArithmeticSite(1.0, 10), "b": final_only(raises, attempts=2)}
    summary = federate(tmp_path / "run", recipe(rounds=1, minimum_sites=2), sites)
    assert len(events(tmp_path / "run", "void")) == 2
    assert {name: site.eval_loss for name, site in summary.sites.items()} == {"a": 1.0, "b": 1.0}


def test_a_final_evaluation_by_too_few_sites_completes_nothing_and_can_be_made_up_for(
    tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    sites: dict[str, Answer] = {"a": ArithmeticSite(1.0, 10), "b": final_only(raises)}
    with pytest.raises(RunError, match="the final evaluation: fewer than 2 sites"):
        federate(tmp_path / "run", recipe(rounds=1, minimum_sites=2), sites)
    assert RunFolder(tmp_path / "run").summary() is None
    assert federate(tmp_path / "run", recipe(rounds=1, minimum_sites=2), sites).status == "completed"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (with_fields(run_id="other"), "belongs to run other"),
        (with_fields(round=7), "of round 7"),
        (raises, "the disk is full"),
    ],
)
def test_a_site_that_did_not_evaluate_the_result_has_no_loss_in_the_end(
    tmp_path: Path, recipe: Callable[..., Recipe], spoil: Callable[[Envelope], Envelope], reason: str
) -> None:
    sites: dict[str, Answer] = {"a": ArithmeticSite(1.0, 10), "b": final_only(spoil)}
    summary = federate(tmp_path / "run", recipe(rounds=2), sites)
    assert {name: site.eval_loss for name, site in summary.sites.items()} == {"a": 1.0, "b": None}
    assert summary.sites["b"].eval_loss_initial == 1.0
    (quarantined,) = events(tmp_path / "run", "quarantined")
    assert reason in quarantined["reason"]


def _is_training(message: Any) -> bool:
    return bool(message.content.config_records["envelope"]["kind"] == "train")


def test_resuming_a_damaged_commit_says_which_and_what_to_do(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    federate(tmp_path / "run", recipe(rounds=2), {"a": ArithmeticSite(1.0, 10)})
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    (newest / "state.safetensors").write_bytes(b"damaged")
    with pytest.raises(RunError, match=f"{newest.name} is damaged"):
        federate(tmp_path / "run", recipe(rounds=2), {"a": ArithmeticSite(1.0, 10)})


def test_round_one_sends_no_state_and_later_rounds_send_it_once_a_site(
    tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    sizes: list[int] = []
    site = ArithmeticSite(1.0, 10)

    def watching(order: Envelope) -> Envelope:
        sizes.append(len(order.payload)) if order.kind == "train" else None
        return site(order)

    summary = federate(tmp_path / "run", recipe(), {"a": watching})
    assert sizes[0] == 0
    assert sizes[1] == sizes[2] == len(START.to_bytes())
    assert summary.bytes_down == 3 * len(START.to_bytes())  # two rounds and the final evaluation
    assert summary.bytes_up == 4 * len(START.to_bytes())  # three rounds, and the state that they begin with, once


def test_summary_holds_every_key_of_the_interface(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    federate(tmp_path / "run", recipe(), {"a": ArithmeticSite(1.0, 10)})
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary.keys() == {
        "schema", "topology", "stage", "tuning", "status", "rounds", "trainable_parameters", "state_digest",
        "train_loss_first", "train_loss_last", "eval_loss_initial", "eval_loss", "metrics", "bytes_up", "bytes_down",
        "seconds", "tokens_trained", "peak_rss_bytes", "sites", "initial_digest", "truncated", "dropped",
        "rounds_done", "void_rounds", "saturated", "curve", "privacy",
    }  # fmt: skip
    assert summary["state_digest"] == final_state(tmp_path / "run").digest
