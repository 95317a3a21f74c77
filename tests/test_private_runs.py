"""Differential privacy in whole runs: what leaves a site, what its account says, and when it stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.enrolment import Enrolment
from client.site import SiteService
from core_training.engine import central
from core_training.engine.engine import Engine, open_engine
from core_training.foundation.errors import InputError, RunError
from core_training.foundation.state import TrainableState
from core_training.foundation.trainable import NOTHING_EVALUATED, DataReport
from core_training.privacy.accounting import epsilon_of
from core_training.privacy.ledger import LEDGER_FILE, Budget, PrivacyLedger
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.run_folder import RunFolder
from simulations import simulate
from strategies.messages import EvaluateOrder, EvaluateReply, JoinOrder, JoinReply, Refusal, TrainOrder, Update

MakeRecipe = Callable[..., Recipe]
ROUNDS = {"kind": "federated", "rounds": 2, "local_steps": 2}
TERMS = {"noise_multiplier": 1.0, "clip": 0.5}


def private(make_recipe: MakeRecipe, site_files: list[Path], **sections: Any) -> Recipe:
    privacy = {"differential_privacy": {**TERMS, **sections.pop("terms", {})}, **sections.pop("privacy", {})}
    topology = {**ROUNDS, **sections.pop("topology", {})}
    sites = {"sites": [str(file) for file in site_files]}
    return make_recipe(topology=topology, privacy=privacy, simulation=sites, **sections)


@pytest.mark.parametrize(
    ("topology", "privacy"),
    [
        ({}, {}),
        ({}, {"codec": "bf16"}),
        ({}, {"secure_aggregation": True}),
        ({"kind": "gossip"}, {}),
        ({"kind": "gossip"}, {"codec": "ring24"}),
    ],
    ids=["federated", "bf16", "masked", "gossip", "gossip in a ring"],
)
def test_no_loss_leaves_a_site_and_each_site_keeps_its_account(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path, topology: dict[str, Any], privacy: dict[str, Any]
) -> None:
    recipe = private(make_recipe, site_files, topology=topology, privacy=privacy)
    assert recipe.aggregation.weights == "equal"
    folder = RunFolder(tmp_path / "run")
    summary = simulate(recipe, folder)
    assert summary.status == "completed"
    assert (summary.train_loss_first, summary.train_loss_last, summary.eval_loss) == (None, None, None)
    assert all(event.loss is None and event.eval_loss is None for event in folder.events(events.Round))
    assert len(list(folder.events(events.Round))) == 2

    ledgers = sorted((tmp_path / "run").rglob(LEDGER_FILE))
    assert len(ledgers) == len(site_files)
    for ledger in ledgers:
        lines = PrivacyLedger(ledger).lines()
        assert [(line.at, line.steps) for line in lines] == [(1, 2), (2, 2)]
        epsilon = epsilon_of([line.release for line in lines], 1e-5)
        name = next(name for name in summary.sites if f"/{name}/" in str(ledger))
        assert summary.sites[name].epsilon == pytest.approx(epsilon)
        assert summary.sites[name].units == summary.sites[name].train_examples
    assert summary.privacy is not None
    assert summary.privacy["epsilon"] == max(site.epsilon or 0 for site in summary.sites.values())
    assert summary.privacy["unit"] == "record"
    # What stays at the site is the site's to see.
    (some,) = [path for path in (tmp_path / "run").rglob("events.jsonl") if path.parent != folder.path][:1]
    if not topology:
        assert any("loss" in line and '"event": "trained"' in line for line in some.read_text().splitlines())


def test_losses_are_told_where_a_simulation_asks_for_them(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path
) -> None:
    summary = simulate(private(make_recipe, site_files, terms={"tell_losses": True}), RunFolder(tmp_path / "run"))
    assert summary.eval_loss is not None
    assert summary.train_loss_last is not None
    assert summary.privacy is not None
    assert summary.privacy["losses_told"]


def test_a_central_run_charges_its_result_and_an_extension_what_came_on_top(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(privacy={"differential_privacy": TERMS})
    folder = RunFolder(tmp_path / "run")
    summary = central.train(recipe, open_engine(recipe), folder)
    assert summary.eval_loss is not None, "the run folder is its owner's"
    longer = make_recipe(privacy={"differential_privacy": TERMS}, training={"max_steps": 9})
    summary = central.train(longer, open_engine(longer), folder, resume=True)
    assert [(line.at, line.steps) for line in PrivacyLedger(folder.path / LEDGER_FILE).lines()] == [(6, 6), (9, 3)]
    assert json.loads((folder.path / "summary.json").read_text())["privacy"]["epsilon"] == summary.privacy["epsilon"]


def test_the_noise_follows_from_the_epsilon_that_was_asked_for(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path
) -> None:
    terms = {"noise_multiplier": None, "epsilon": 20.0, "tell_losses": True}
    summary = simulate(private(make_recipe, site_files, terms=terms), RunFolder(tmp_path / "run"))
    for site in summary.sites.values():
        assert 19 < (site.epsilon or 0) <= 20


# One site, asked by hand


class Asked:
    """A site's service with an account, and orders to it."""

    def __init__(self, recipe: Recipe, folder: Path, budget: Budget | None = None) -> None:
        self.ledger = PrivacyLedger(folder / LEDGER_FILE, budget)
        folder.mkdir(exist_ok=True)
        enrolment = Enrolment("federated", "secret", ledger=self.ledger)
        self.recipe = recipe
        self.service = SiteService("a", open_engine, folder / "runs", enrolment)

    def join(self) -> Any:
        order = JoinOrder(run_id="run", version=_version(), recipe=self.recipe.to_yaml())
        self.reply = self.service.handle(order.envelope())
        return self.reply

    def order(self, number: int, state: TrainableState | None = None) -> TrainOrder:
        manifest = open_engine(self.recipe).manifest if state is None else state.manifest
        return TrainOrder(
            run_id="run",
            round=number,
            steps=2,
            evaluate=True,
            manifest_digest=manifest.digest,
            payload=state.to_bytes() if state is not None else b"",
        )

    def train(self, order: TrainOrder) -> Any:
        envelope = self.service.handle(order.envelope())
        return Update.open(envelope) if envelope.kind == Update.kind else Refusal.open(envelope)


def _version() -> str:
    from core_training import __version__

    return __version__


@pytest.fixture
def one_site(make_recipe: MakeRecipe) -> Recipe:
    return make_recipe(topology=ROUNDS, privacy={"differential_privacy": TERMS})


def test_a_repeated_order_is_answered_with_the_same_bytes_and_charged_once(one_site: Recipe, tmp_path: Path) -> None:
    site = Asked(one_site, tmp_path / "site")
    site.join()
    order = site.order(1)
    first, again = site.train(order), site.train(order)
    assert bytes(first.payload) == bytes(again.payload)
    restarted = Asked(one_site, tmp_path / "site")
    assert bytes(restarted.train(order).payload) == bytes(first.payload)
    assert len(restarted.ledger.lines()) == 1
    assert (first.train.weight, first.train.tokens, first.train.loss_mean, first.evaluation) == (0, 0, 0.0, None)


def test_a_round_from_another_state_is_another_release(one_site: Recipe, tmp_path: Path) -> None:
    """A server that is taken back, or that tries what comes of other states, pays for each answer."""
    site = Asked(one_site, tmp_path / "site")
    site.join()
    engine = open_engine(one_site)
    start = engine.initial_state
    site.train(site.order(1))
    other = TrainableState(start.manifest, start.buffer + np.float32(1e-3))
    site.train(site.order(1, other))
    assert [line.at for line in site.ledger.lines()] == [1, 1]


def test_the_final_evaluation_tells_nothing(one_site: Recipe, tmp_path: Path) -> None:
    site = Asked(one_site, tmp_path / "site")
    site.join()
    state = open_engine(one_site).initial_state
    order = EvaluateOrder(
        run_id="run", round=0, final=False, manifest_digest=state.manifest.digest, payload=state.to_bytes()
    )
    reply = EvaluateReply.open(site.service.handle(order.envelope()))
    assert (reply.evaluation.loss_sum, reply.evaluation.weight, reply.evaluation.examples) == (0.0, 0, 0)


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"eval_fraction": 0.0}},
        {"data": {"eval_fraction": 0.7}},
        {"data": {"eval_fraction": 0.999999}},
        {"training": {"max_length": 8}},
        {"data": {"on_error": "skip"}},
    ],
    ids=str,
)
def test_what_a_site_says_of_its_data_does_not_go_by_what_a_recipe_does_with_it(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path, sections: dict[str, Any]
) -> None:
    """A server that could choose which record is held out, or too long, would ask for one after the other."""
    records = sum(len(path.read_text().splitlines()) for path in site_files)
    site = Asked(make_recipe(topology=ROUNDS, privacy={"differential_privacy": TERMS}, **sections), tmp_path / "site")
    reply = JoinReply.open(site.join())
    assert reply.data == DataReport(records, 0, 0, 0, records)
    assert isinstance(site.train(site.order(1)), Update), "also where nothing is left to train on"


def test_a_state_that_makes_records_diverge_is_answered_and_charged_as_any_other(
    one_site: Recipe, tmp_path: Path
) -> None:
    """A refusal would tell that a record, for which the state was made, is there."""
    site = Asked(one_site, tmp_path / "site")
    site.join()
    start = open_engine(one_site).initial_state
    huge = TrainableState(start.manifest, np.full_like(start.buffer, 1e30))
    update = site.train(site.order(1, huge))
    assert isinstance(update, Update)
    assert TrainableState.from_bytes(bytes(update.payload), start.manifest).is_finite()
    assert len(site.ledger.lines()) == 1
    order = EvaluateOrder(
        run_id="run", round=1, final=False, manifest_digest=start.manifest.digest, payload=huge.to_bytes()
    )
    reply = EvaluateReply.open(site.service.handle(order.envelope()))
    assert reply.evaluation == NOTHING_EVALUATED


def test_a_slice_that_fails_is_charged_each_time(
    one_site: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Asked(one_site, tmp_path / "site")
    site.join()
    monkeypatch.setattr(Engine, "train", lambda *_, **__: (_ for _ in ()).throw(RunError("no memory")))
    for _ in range(2):
        assert isinstance(site.train(site.order(1)), Refusal)
    assert [line.at for line in site.ledger.lines()] == [1, 1]


def test_what_is_in_a_checkpoint_is_on_the_account(
    one_site: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moments in it go on into later rounds, also when a kill came before the answer."""
    site = Asked(one_site, tmp_path / "site")
    site.join()
    monkeypatch.setattr(Engine, "checkpoint", lambda *_, **__: (_ for _ in ()).throw(RunError("killed")))
    assert isinstance(site.train(site.order(1)), Refusal)
    assert len(site.ledger.lines()) == 1


def test_the_epsilon_that_a_recipe_names_is_kept_to_without_a_budget(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    terms = {"epsilon": 20.0, "clip": 0.5}
    recipe = make_recipe(
        topology=ROUNDS,
        training={"per_device_train_batch_size": 1000},
        privacy={"differential_privacy": terms},
    )
    site = Asked(recipe, tmp_path / "site")
    site.join()
    start = open_engine(recipe).initial_state
    states = [TrainableState(start.manifest, start.buffer + np.float32(1e-3 * number)) for number in range(3)]
    answers = [site.train(site.order(1, state)) for state in states]
    assert [type(answer) for answer in answers] == [Update, Update, Refusal]
    assert "its recipe says 20" in answers[2].reason


def test_a_real_site_tells_no_losses_whatever_its_budget(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(topology=ROUNDS, privacy={"differential_privacy": {**TERMS, "tell_losses": True}})
    assert "it is for simulations" in Refusal.open(Asked(recipe, tmp_path / "site").join()).reason


def test_a_run_that_would_spend_more_than_the_budget_is_refused_before_it_begins(
    one_site: Recipe, tmp_path: Path
) -> None:
    site = Asked(one_site, tmp_path / "site", Budget("record", 0.5, 1e-5))
    reply = Refusal.open(site.join())
    assert reply.fatal
    assert "its budget is 0.5" in reply.reason


def test_a_site_stops_when_its_budget_is_spent_whatever_it_was_promised(one_site: Recipe, tmp_path: Path) -> None:
    """The rounds of a run that is taken back count as well: what left cannot be had back."""
    planned = Asked(one_site, tmp_path / "other")
    planned.join()
    planned.train(planned.order(1))
    per_round = [line.release for line in planned.ledger.lines()]
    budget = Budget("record", epsilon_of(per_round * 2, 1e-5) + 0.01, 1e-5)
    site = Asked(one_site, tmp_path / "site", budget)
    site.join()
    start = open_engine(one_site).initial_state
    for number in range(2):
        other = TrainableState(start.manifest, start.buffer + np.float32(1e-3 * number))
        assert isinstance(site.train(site.order(1, other)), Update)
    refusal = site.train(site.order(2, start))
    assert isinstance(refusal, Refusal)
    assert refusal.fatal
    assert "is spent" in refusal.reason
    assert len(site.ledger.lines()) == 2


@pytest.mark.parametrize(
    ("privacy", "said"),
    [
        ({}, "takes part in no run without it"),
        ({"differential_privacy": {**TERMS, "unit": "question"}}, "this site's budget is for each record"),
    ],
)
def test_a_site_with_a_budget_refuses_what_is_not_counted_in_it(
    make_recipe: MakeRecipe, tmp_path: Path, privacy: dict[str, Any], said: str
) -> None:
    recipe = make_recipe(topology=ROUNDS, privacy=privacy)
    site = Asked(recipe, tmp_path / "site", Budget("record", 100.0, 1e-5))
    assert said in Refusal.open(site.join()).reason


def test_nothing_leaves_that_is_not_on_the_account(
    one_site: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Asked(one_site, tmp_path / "site")
    site.join()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("No space left on device")))
    assert isinstance(site.train(site.order(1)), Refusal)


# What cannot go together


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"stage": "kto"}, "stage"),
        ({"stage": "ppo", "rollout": {"reward_function": "trl:think_format_reward"}}, "stage"),
        ({"training": {"packing": True}}, "training.packing"),
        ({"training": {"load_best_model_at_end": True}}, "training.load_best_model_at_end"),
        ({"training": {"torch_compile": True}}, "training.torch_compile"),
        ({"deepspeed": {"stage": 0, "processes": 2}}, "deepspeed"),
        ({"data": {"cache": "here"}}, "data.cache"),
        ({"data": {"mix": {"alpha": 1.0}}}, "data.mix"),
        ({"data": {"max_samples": 5}}, "data.max_samples"),
        ({"model": {"router_aux_loss_coef": 0.1}}, "model.router_aux_loss_coef"),
        ({"topology": {**ROUNDS, "early_stopping_patience": 2}}, "topology.early_stopping_patience"),
        ({"topology": {**ROUNDS, "own_steps": 3}}, "topology.own_steps"),
        ({"topology": {"kind": "federated", "rounds": 2, "local_epochs": 0.5}}, "topology.local_epochs"),
        ({"topology": ROUNDS, "aggregation": {"weights": "loss_units"}}, "aggregation.weights"),
        ({"topology": ROUNDS, "tuning": {"lora": {"site_ranks": {"a": 2}}}}, "tuning.lora.site_ranks"),
    ],
)
def test_what_would_undo_it_is_refused_by_its_key(make_recipe: MakeRecipe, sections: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=f"{key}: under privacy.differential_privacy"):
        make_recipe(privacy={"differential_privacy": TERMS}, **sections)


@pytest.mark.parametrize("terms", [{}, {"noise_multiplier": 1.0, "epsilon": 8.0}])
def test_either_noise_or_epsilon_is_given(make_recipe: MakeRecipe, terms: dict[str, float]) -> None:
    with pytest.raises(InputError, match="give either noise_multiplier or epsilon"):
        make_recipe(privacy={"differential_privacy": terms})


def test_a_column_of_sites_is_no_unit(make_recipe: MakeRecipe) -> None:
    """An account of whole sites would take it for one of theirs."""
    with pytest.raises(InputError, match="level: site"):
        make_recipe(privacy={"differential_privacy": {**TERMS, "unit": "site"}})


def test_a_site_that_trains_under_deepspeed_refuses_it(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(privacy={"differential_privacy": TERMS})
    used = recipe.deepspeed.model_copy(update={"processes": 2})
    with pytest.raises(InputError, match="deepspeed"):
        open_engine(recipe.model_copy(update={"deepspeed": used}))


def test_enrolments_without_an_account_are_as_before() -> None:
    assert replace(Enrolment("federated", "secret")).ledger is None


# Whole sites


@pytest.mark.parametrize("kind", ["federated", "gossip"])
def test_masked_sums_that_hide_whole_sites(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path, kind: str
) -> None:
    recipe = make_recipe(
        topology={"kind": kind, "rounds": 2, "local_steps": 2},
        privacy={
            "secure_aggregation": {"minimum_sites": 2},
            "codec": "ring32",
            "differential_privacy": {"level": "site", "clip": 0.1, "noise_multiplier": 0.5},
        },
        simulation={"sites": [str(file) for file in site_files]},
    )
    summary = simulate(recipe, RunFolder(tmp_path / "run"))
    assert summary.privacy is not None
    assert (summary.privacy["unit"], summary.train_loss_last, summary.eval_loss) == ("site", None, None)
    lines = [PrivacyLedger(path).lines() for path in (tmp_path / "run").rglob(LEDGER_FILE)]
    assert [[(line.unit, line.steps, line.noise_multiplier) for line in own] for own in lines] == [
        [("site", 1, 0.5)] * 2
    ] * len(site_files)
    assert summary.privacy["epsilon"] == pytest.approx(epsilon_of([line.release for line in lines[0]], 1e-5))
    again, other = (simulate(recipe, RunFolder(tmp_path / "again" / name)) for name in ("run", "other"))
    assert again.state_digest == summary.state_digest, "noise is by secrets, which a simulation makes of names"
    assert kind == "gossip" or other.state_digest != summary.state_digest, "no other run has its noise"


@pytest.mark.parametrize(
    ("privacy", "more", "key"),
    [
        ({}, {}, "privacy.secure_aggregation"),
        ({"secure_aggregation": True, "clip": 1.0}, {}, "privacy.clip"),
        ({"secure_aggregation": True}, {"topology": {"kind": "central"}}, "topology.kind"),
        ({"secure_aggregation": True}, {"aggregation": {"weights": "loss_units"}}, "aggregation.weights"),
    ],
)
def test_what_would_not_hide_a_site_is_refused_by_its_key(
    make_recipe: MakeRecipe, privacy: dict[str, Any], more: dict[str, Any], key: str
) -> None:
    terms = {"level": "site", "noise_multiplier": 1.0}
    with pytest.raises(InputError, match=f"{key}: under privacy.differential_privacy"):
        make_recipe(privacy={**privacy, "differential_privacy": terms}, **{"topology": ROUNDS, **more})
