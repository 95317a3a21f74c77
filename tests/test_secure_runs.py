"""Secure aggregation in whole runs: masks change no bit of the result, whoever drops out and whenever."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from core_training.foundation.errors import RunError
from core_training.foundation.state import TrainableState
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from simulations import simulate
from simulations.sites import SitePool
from strategies.messages import Envelope
from tests import tiny
from tests.failing_sites import Fault, federate

pytestmark = pytest.mark.slow
MakeRecipe = Callable[..., Recipe]
MASKED = {"secure_aggregation": {"threshold": 0.55, "minimum_sites": 2}}
PLAIN = {"codec": "ring16"}


def nobody(site: str, order: Envelope) -> None:
    return None


@pytest.fixture(scope="module")
def many_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Sixteen sites of unequal size."""
    folder = tmp_path_factory.mktemp("sites")
    return [
        str(tiny.write_jsonl(folder / f"s{number:02}.jsonl", tiny.questions(number, 8 + number % 5)))
        for number in range(16)
    ]


@pytest.fixture
def recipe(make_recipe: MakeRecipe, many_files: list[str]) -> MakeRecipe:
    def make(sites: int, privacy: dict[str, Any], mode: str = "lora", rounds: int = 2, **topology: Any) -> Recipe:
        return make_recipe(
            tuning={"mode": mode},
            simulation={"sites": many_files[:sites]},
            privacy=privacy,
            topology={"kind": "federated", "rounds": rounds, "local_steps": 1, **topology},
        )

    return make


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("sites", [3, 5, 16])
def test_masks_change_no_bit_of_the_result(recipe: MakeRecipe, tmp_path: Path, sites: int, mode: str) -> None:
    masked = federate(recipe(sites, MASKED, mode), tmp_path / "masked", nobody)
    plain = federate(recipe(sites, PLAIN, mode), tmp_path / "plain", nobody)
    assert masked.state_digest == plain.state_digest
    assert masked.eval_loss == plain.eval_loss
    for figure in ("train_loss_first", "train_loss_last", "eval_loss_initial", "tokens_trained", "saturated"):
        assert getattr(masked, figure) == pytest.approx(getattr(plain, figure), abs=1e-5), figure


@pytest.mark.parametrize("codec", ["ring24", "ring32"])
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_masks_change_nothing_in_any_ring_nor_with_a_shared_random_mask(
    recipe: MakeRecipe, tmp_path: Path, codec: str, keep: float
) -> None:
    plain = {"codec": codec, "keep": keep}
    masked = federate(recipe(3, {**plain, **MASKED}), tmp_path / "masked", nobody)
    assert masked.state_digest == federate(recipe(3, plain), tmp_path / "plain", nobody).state_digest


def at(step: str, *sites: str, when: str = "before", round_number: int | None = None) -> Fault:
    """Sites that are lost at a step: that of an order, or one of secure aggregation."""

    def fault(site: str, order: Envelope) -> str | None:
        hit = step in (order.kind, order.fields.get("step"))
        hit = hit and (round_number is None or order.fields.get("round") == round_number)
        return when if hit and site in sites else None

    return fault


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_who_drops_out_around_masking_is_left_out_of_the_sum_and_nothing_else_changes(
    recipe: MakeRecipe, tmp_path: Path, when: str, mode: str
) -> None:
    lost = at("train", "s01", "s03", when=when, round_number=1)
    masked = federate(recipe(5, MASKED, mode), tmp_path / "masked", lost)
    plain = federate(recipe(5, PLAIN, mode), tmp_path / "plain", lost)
    assert masked.state_digest == plain.state_digest
    assert masked.void_rounds == 0
    assert {name: site.rounds for name, site in masked.sites.items()} == {
        "s00": 2,
        "s01": 1,
        "s02": 2,
        "s03": 1,
        "s04": 2,
    }


@pytest.mark.parametrize("sites", [3, 5, 16])
def test_who_drops_out_while_the_sum_is_opened_is_still_in_it(recipe: MakeRecipe, tmp_path: Path, sites: int) -> None:
    masked = federate(recipe(sites, MASKED), tmp_path / "masked", at("unmask", "s01"))
    plain = federate(recipe(sites, PLAIN), tmp_path / "plain", nobody)
    assert masked.state_digest == plain.state_digest


@pytest.mark.parametrize("step", ["keys", "shares"])
def test_who_drops_out_of_the_set_up_is_no_part_of_its_rounds(recipe: MakeRecipe, tmp_path: Path, step: str) -> None:
    masked = federate(recipe(5, MASKED), tmp_path / "masked", at(step, "s02"))
    others = ["s00", "s01", "s03", "s04"]
    plain = federate(recipe(5, PLAIN), tmp_path / "plain", nobody, sites=others)
    assert masked.state_digest == plain.state_digest
    assert masked.sites["s02"].rounds == 0


def test_a_round_whose_sum_cannot_be_opened_is_void_and_the_run_goes_on(recipe: MakeRecipe, tmp_path: Path) -> None:
    gone = ["s01", "s02", "s03"]

    def fault(site: str, order: Envelope) -> str | None:
        if order.kind == "train":
            fault_round.append(order.fields["round"])
        return "before" if order.fields.get("step") == "unmask" and fault_round[-1] == 2 and site in gone else None

    fault_round: list[int] = []
    settings = recipe(5, MASKED, rounds=3)
    training = settings.training.model_copy(update={"logging_steps": 1})
    settings = settings.model_copy(update={"training": training})
    summary = federate(settings, tmp_path / "run", fault)
    run = RunFolder(tmp_path / "run")
    (void,) = run.lines("round_void")
    assert void["round"] == 2
    assert [event["round"] for event in run.lines("round")] == [1, 3, 4]
    assert (summary.void_rounds, summary.rounds, summary.rounds_done) == (1, 3, 3)
    assert all(site.rounds == 3 for site in summary.sites.values())
    whole = federate(settings, tmp_path / "whole", nobody)
    assert whole.rounds == summary.rounds
    first, _, *others = rates(tmp_path / "run")  # of four rounds, the second of which was void
    assert [first, *others] == rates(tmp_path / "whole"), "the learning rate goes by the rounds that counted"


def rates(run: Path) -> list[float]:
    """The learning rates of the steps of a run's first site."""
    (folder,) = (run / "sites" / "s00").iterdir()
    return [event["learning_rate"] for event in RunFolder(folder).lines("logged")]


def test_three_void_rounds_in_a_row_end_the_run_which_can_go_on_later(recipe: MakeRecipe, tmp_path: Path) -> None:
    settings = recipe(3, MASKED, rounds=5)
    with pytest.raises(RunError, match="3 rounds in a row were void"):
        federate(settings, tmp_path / "run", at("unmask", "s00", "s01"))
    summary = federate(settings, tmp_path / "run", nobody)
    assert (summary.void_rounds, summary.rounds) == (3, 5)


def test_a_run_that_went_on_after_three_void_rounds_stops_after_three_more(recipe: MakeRecipe, tmp_path: Path) -> None:
    settings, lost = recipe(3, MASKED, rounds=8), at("unmask", "s00", "s01")
    for committed in (3, 6):
        with pytest.raises(RunError, match=f"can go on after round {committed}: .*s00 is gone"):
            federate(settings, tmp_path / "run", lost)
    summary = RunFolder(tmp_path / "run").summary()
    assert summary is not None
    assert (summary["status"], summary["rounds_done"], summary["void_rounds"]) == ("failed", 0, 6)
    for _ in range(2):  # the second time nobody is asked for anything
        with pytest.raises(RunError, match="8 rounds were void, the most that this run may have"):
            federate(settings, tmp_path / "run", lost)
    assert not (tmp_path / "run" / "adapter").exists()


def rewrite(order: Envelope, **terms: Any) -> None:
    """Have an order on its way name other terms of its ring."""
    ring = {**order.fields["ring"], **terms}
    object.__setattr__(order, "text", json.dumps({**order.fields, "ring": ring}))


def narrowed(round_number: int, *sites: str) -> tuple[Fault, list[list[int]]]:
    """Orders of a round get a scale that cuts everything at these sites; and the scales of all orders, in turn."""
    seen: list[list[int]] = []

    def fault(site: str, order: Envelope) -> None:
        if order.kind == "train":
            scale = order.fields["ring"]["scale"]
            seen.append(scale["exponents"])
            if order.fields["round"] == round_number and site in sites:
                rewrite(order, scale={**scale, "exponents": [40] * len(scale["exponents"])})

    return fault, seen


@pytest.mark.parametrize("privacy", [MASKED, PLAIN], ids=["masked", "plain"])
def test_after_a_site_whose_update_did_not_fit_the_scale_the_next_round_has_a_wider_one(
    recipe: MakeRecipe, tmp_path: Path, privacy: dict[str, Any]
) -> None:
    """It is in no sum, so the sums do not tell of it."""
    fault, seen = narrowed(2, "s01")
    summary = federate(recipe(4, privacy, rounds=3), tmp_path / "run", fault)
    rounds = {name: site.rounds for name, site in summary.sites.items()}
    assert rounds == {"s00": 3, "s01": 2, "s02": 3, "s03": 3}
    second, third = seen[4], seen[-1]
    assert all(wide <= narrow for wide, narrow in zip(third, second, strict=True))
    assert third != second


def test_plain_updates_that_all_outgrow_the_scale_are_asked_for_again_on_a_wider_one(
    recipe: MakeRecipe, tmp_path: Path
) -> None:
    orders: list[str] = []

    def fault(site: str, order: Envelope) -> None:
        if order.kind == "train" and order.fields["round"] == 2:
            orders.append(site)
            if len(orders) <= 3:
                scale = order.fields["ring"]["scale"]
                rewrite(order, scale={**scale, "exponents": [40] * len(scale["exponents"])})

    summary = federate(recipe(3, PLAIN), tmp_path / "run", fault)
    assert (summary.rounds, len(orders)) == (2, 6)


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it and tidy up."""


def killed_at(step: str, sites: int = 3) -> Fault:
    """The server dies as it gives the second site its order, in the second round."""
    orders: list[str] = []

    def fault(site: str, order: Envelope) -> None:
        orders.append(order.fields.get("step", order.kind))
        if orders.count(step) == sites + 2:
            raise Killed

    return fault


def test_a_server_killed_while_sites_mask_goes_on_as_if_never_killed(recipe: MakeRecipe, tmp_path: Path) -> None:
    settings = recipe(3, MASKED, rounds=3)
    whole = federate(settings, tmp_path / "whole", nobody)
    with pytest.raises(Killed):
        federate(settings, tmp_path / "run", killed_at("train"))
    summary = federate(settings, tmp_path / "run", nobody)
    assert (summary.void_rounds, summary.state_digest) == (0, whole.state_digest)


def test_a_server_that_comes_back_to_fewer_sites_asks_them_for_the_very_same_vectors(
    recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Whoever is away belongs to the round all the same: the others' masks were made with it."""
    settings = recipe(3, MASKED, rounds=3)
    with pytest.raises(Killed):
        federate(settings, tmp_path / "run", killed_at("train"))
    summary = federate(settings, tmp_path / "run", nobody, sites=["s00", "s01"])
    assert (summary.rounds, summary.void_rounds) == (3, 0)
    second = list(RunFolder(tmp_path / "run").lines("round"))[1]
    assert (second["round"], sorted(second["sites"])) == (2, ["s00", "s01"])
    assert list(RunFolder(tmp_path / "run").lines("quarantined")) == []


def test_too_few_of_a_rounds_sites_after_a_kill_make_it_void_and_the_run_goes_on(
    recipe: MakeRecipe, tmp_path: Path
) -> None:
    settings = recipe(5, MASKED, rounds=3)
    killed = killed_at("train", sites=5)
    with pytest.raises(Killed):
        federate(settings, tmp_path / "run", killed)
    summary = federate(settings, tmp_path / "run", nobody, sites=["s03", "s04"])
    assert (summary.rounds, summary.void_rounds) == (3, 1)


def test_a_server_killed_while_the_sum_is_opened_goes_on_without_whoever_had_answered(
    recipe: MakeRecipe, tmp_path: Path
) -> None:
    """A site that has helped to open a sum masks nothing for that round again, nor can it: its secrets are gone."""
    settings = recipe(3, MASKED, rounds=3)
    with pytest.raises(Killed):
        federate(settings, tmp_path / "run", killed_at("unmask"))
    summary = federate(settings, tmp_path / "run", nobody)
    lost = at("train", "s00", when="after", round_number=2)
    without = federate(recipe(3, PLAIN, rounds=3), tmp_path / "plain", lost)
    assert (summary.void_rounds, summary.state_digest) == (0, without.state_digest)


def test_the_server_learns_no_site_s_loss_or_weight_of_a_round(recipe: MakeRecipe, tmp_path: Path) -> None:
    federate(recipe(3, MASKED), tmp_path / "run", nobody)
    for event in RunFolder(tmp_path / "run").lines("round"):
        assert event["loss"] > 0
        assert all(site[key] is None for site in event["sites"].values() for key in ("loss", "eval_loss", "weight"))


def test_an_order_to_send_the_update_unmasked_is_refused(recipe: MakeRecipe, tmp_path: Path) -> None:
    settings = recipe(3, MASKED, rounds=1)
    seen: list[Envelope] = []

    def spy(site: str, order: Envelope) -> str | None:
        if order.kind == "train":
            rewrite(order, masking=None)
            seen.append(order)
        return None

    with pytest.raises(RunError, match="void"):
        federate(settings, tmp_path / "run", spy)
    reasons = [event["reason"] for event in RunFolder(tmp_path / "run").lines("quarantined")]
    assert len(reasons) == len(seen) == 9  # three sites, in each of the three void rounds that a run may have in a row
    assert all("would have the update leave unmasked" in reason for reason in reasons)


def test_a_site_tells_its_own_loss_of_one_result_and_of_no_other_state(recipe: MakeRecipe, tmp_path: Path) -> None:
    asked: list[Envelope] = []

    def spy(site: str, order: Envelope) -> None:
        if order.kind == "evaluate":
            asked.append(order)

    settings = recipe(3, MASKED, rounds=1)
    federate(settings, tmp_path / "run", spy)
    pool = SitePool(settings, tmp_path / "run" / "sites")
    assert pool.service("s00").handle(asked[0]).kind == "evaluated"
    state = TrainableState.from_arrays(load(asked[0].payload), pool.service("s00")._run.manifest)  # type: ignore[union-attr]
    made_up = TrainableState(state.manifest, state.buffer + np.float32(1e-3)).to_bytes()
    for fields in ({}, {"final": False}):
        answer = pool.service("s00").handle(Envelope.of("evaluate", {**asked[0].fields, **fields}, made_up))
        assert answer.kind == "refused"
    pool.close()


def test_secrets_of_a_site_are_for_its_owner_alone(recipe: MakeRecipe, tmp_path: Path) -> None:
    federate(recipe(3, MASKED), tmp_path / "run", nobody)
    files = list((tmp_path / "run").rglob("secure-aggregation.json"))
    assert len(files) == 3
    for file in files:
        assert file.stat().st_mode & 0o077 == 0
        json.loads(file.read_text())


def test_gossip_masked_or_not_ends_with_the_server_s_state(recipe: MakeRecipe, tmp_path: Path) -> None:
    federated = federate(recipe(3, MASKED), tmp_path / "federated", nobody)
    for name, privacy in {"masked": MASKED, "plain": PLAIN}.items():
        gossip = recipe(3, privacy, kind="gossip")
        summary = simulate(gossip, RunFolder(tmp_path / name))
        assert summary.state_digest == federated.state_digest
        assert (summary.void_rounds, summary.saturated) == (0, federated.saturated)
        assert ("secure_aggregation" in summary.seconds) == (name == "masked")


@pytest.mark.parametrize("kind", ["federated", "gossip"])
def test_changes_in_bf16_train_as_well_as_states_in_fp32(recipe: MakeRecipe, tmp_path: Path, kind: str) -> None:
    exact, rounded = (
        simulate(recipe(3, {"codec": codec}, rounds=4, kind=kind), RunFolder(tmp_path / codec))
        for codec in ("fp32", "bf16")
    )
    assert rounded.eval_loss == pytest.approx(exact.eval_loss, rel=0.01)
    assert (rounded.bytes_up or 0) < 0.7 * (exact.bytes_up or 0)
