"""Sites that judge the state after each round: what a run stops by, and chooses its result by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core_training.foundation.errors import InputError
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.run_folder import RunFolder
from simulations import simulate
from tests.server.arithmetic_sites import ArithmeticSite, federate

MakeRecipe = Callable[..., Recipe]
MASKED = {"secure_aggregation": {"threshold": 0.55, "minimum_sites": 2}}


@pytest.fixture
def judged(make_recipe: MakeRecipe, site_files: list[Path]) -> MakeRecipe:
    def make(judges: list[str], privacy: dict[str, Any], **training: Any) -> Recipe:
        return make_recipe(
            topology={"kind": "federated", "rounds": 3, "local_steps": 1, "judged_by": judges},
            simulation={"sites": [str(path) for path in site_files]},
            privacy=privacy,
            training=training,
        )

    return make


def losses(run: Path) -> list[float | None]:
    return [event.eval_loss for event in RunFolder(run).events(events.Round)]


@pytest.mark.parametrize("privacy", [{}, {"codec": "ring16"}], ids=["clear", "ring"])
def test_a_rounds_loss_is_that_of_those_who_judge(judged: MakeRecipe, tmp_path: Path, privacy: dict[str, Any]) -> None:
    alone = simulate(judged(["site1"], privacy), RunFolder(tmp_path / "alone"))
    whole = simulate(judged([], privacy), RunFolder(tmp_path / "whole"))
    assert alone.state_digest == whole.state_digest
    assert alone.eval_loss == whole.eval_loss, "the result is evaluated by all"
    clear = tmp_path / "clear"
    simulate(judged([], {}), RunFolder(clear))
    of_site = [event.sites["site1"]["eval_loss"] for event in RunFolder(clear).events(events.Round)]
    assert losses(tmp_path / "alone") == pytest.approx(of_site, rel=2e-3)
    assert losses(tmp_path / "alone") != pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_the_best_state_is_chosen_by_those_who_judge(judged: MakeRecipe, tmp_path: Path) -> None:
    simulate(judged(["site2"], {}, load_best_model_at_end=True), RunFolder(tmp_path / "run"))
    (last,) = RunFolder(tmp_path / "run").events(events.LastStateEvaluated)
    final = RunFolder(tmp_path / "run").summary()
    assert final is not None
    assert last.eval_loss == pytest.approx(final["sites"]["site2"]["eval_loss"])


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"topology": {"judged_by": ["site1"]}}, "topology.judged_by: with it the sum"),
        ({"aggregation": {"weights": "given", "site_weights": {"site1": 9}}}, "aggregation.site_weights: with it the"),
        ({"tuning": {"lora": {"r": 4, "site_ranks": {"site1": 1}}}}, "tuning.lora.site_ranks: with it the sum"),
    ],
)
def test_what_singles_out_a_site_is_refused_under_masks(make_recipe: MakeRecipe, sections: Any, said: str) -> None:
    for kind in ("federated", "gossip"):
        if kind == "gossip" and "judged_by" in said:
            continue
        topology = {"kind": kind, "rounds": 2, "local_steps": 1, **sections.get("topology", {})}
        with pytest.raises(InputError, match=said):
            make_recipe(**{**sections, "topology": topology, "privacy": MASKED})


def test_a_name_that_no_site_has_is_refused(judged: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"topology.judged_by: the run has no site 'sit1'; it has site0, site1, site2"):
        simulate(judged(["sit1"], {}), RunFolder(tmp_path / "run"))


def test_who_is_no_judge_stops_nothing(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    """Sites that judge all the same are set aside, by name."""
    topology = {"kind": "federated", "rounds": 4, "local_steps": 1, "judged_by": ["a"], "early_stopping_patience": 1}
    sites = {"a": ArithmeticSite(1.0, 10), "b": ArithmeticSite(1.0, 10)}
    sites["a"].losses, sites["b"].losses = [4.0, 3.0, 2.0, 1.0], [1.0, 9.0, 9.0, 9.0]
    summary = federate(tmp_path / "run", make_recipe(topology=topology), dict(sites))
    assert summary.rounds_done == 4
    (first, *_) = RunFolder(tmp_path / "run").events(events.Quarantined)
    assert (first.site, first.reason) == ("b", "it sends an evaluation, and is none of topology.judged_by")


def test_nodes_judge_for_themselves(make_recipe: MakeRecipe) -> None:
    with pytest.raises(InputError, match=r"topology.judged_by: gossip nodes agree"):
        make_recipe(topology={"kind": "gossip", "rounds": 2, "local_steps": 1, "judged_by": ["a"]})
