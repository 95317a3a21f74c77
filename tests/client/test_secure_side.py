"""A site's side of secure aggregation in one run: with whom it hides its updates, and for how long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from client import secure_side
from client.enrolment import Enrolment
from client.secure_side import SecureSide
from core_training.foundation.errors import InputError, ProtocolError
from core_training.recipe.schema import Recipe
from security.identities import roster_digest
from security.secure_aggregation.server import ServerBatch
from security.secure_aggregation.terms import Minimums, terms_of
from simulations.enrolment import enrolments_of, identities_of
from strategies.messages import SecureOrder
from strategies.ring_scale import largest_change

FIRST, LATER = ["a", "b", "c"], ["a", "b", "c", "liver"]


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    return make_recipe(
        privacy={"secure_aggregation": True}, topology={"kind": "federated", "rounds": 1, "local_steps": 1}
    )


def enrolment(sites: list[str]) -> Enrolment:
    """What site a brings when it has pinned a roster of these sites."""
    return enrolments_of(sites, "federated")["a"]


def keys_order(recipe: Recipe) -> SecureOrder:
    batch = ServerBatch("r", 1, 2, identities_of(FIRST), terms_of(recipe, largest_change(recipe)))
    return SecureOrder(run_id="r", step="keys", payload=batch.keys_order())


def test_a_run_goes_on_with_the_roster_that_its_masks_began_with(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "secure-aggregation.json"
    SecureSide("a", enrolment(FIRST), recipe, "r", file).answer(keys_order(recipe))
    side = SecureSide("a", enrolment(LATER), recipe, "r", file)
    assert side.roster_digest == roster_digest(identities_of(FIRST))
    assert side.answer(keys_order(recipe)).payload


def test_until_masks_have_begun_the_roster_is_the_one_that_is_pinned(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "secure-aggregation.json"
    SecureSide("a", enrolment(FIRST), recipe, "r", file)
    side = SecureSide("a", enrolment(LATER), recipe, "r", file)
    assert side.roster_digest == roster_digest(identities_of(LATER))
    with pytest.raises(ProtocolError, match="roster"):
        side.answer(keys_order(recipe))


def test_a_site_without_a_roster_is_told_how_to_get_one(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`fedloom client pin roster\.json`, and stop and start it"):
        SecureSide("liver", enrolment(FIRST), recipe, "r", tmp_path / "secure-aggregation.json")


def test_a_site_that_demands_more_than_the_recipe_offers_is_told_so_before_a_round(
    recipe: Recipe, tmp_path: Path
) -> None:
    demanding = replace(enrolment(FIRST), minimums=Minimums(minimum_sites=9))
    with pytest.raises(InputError, match="minimum_sites 3: this site takes part from 9 up"):
        SecureSide("a", demanding, recipe, "r", tmp_path / "secure-aggregation.json")


def test_a_kill_while_secrets_go_leaves_no_run_that_masks_on(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "secure-aggregation.json"
    side = SecureSide("a", enrolment(FIRST), recipe, "r", file)
    side.answer(keys_order(recipe))

    def killed(path: Path, data: bytes) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(secure_side, "replace_private_file", killed)
        with pytest.raises(KeyboardInterrupt):
            side.admit_evaluation(final=True, state_digest="0" * 64)
    restarted = SecureSide("a", enrolment(FIRST), recipe, "r", file)
    with pytest.raises(ProtocolError, match="nothing more is masked"):
        restarted.answer(keys_order(recipe))
    restarted.admit_evaluation(final=True, state_digest="0" * 64)
    assert '"seeds": []' in file.read_text()


def test_one_state_is_evaluated_as_the_result_and_none_on_the_way(recipe: Recipe, tmp_path: Path) -> None:
    side = SecureSide("a", enrolment(FIRST), recipe, "r", tmp_path / "secure-aggregation.json")
    with pytest.raises(ProtocolError, match="of the result alone"):
        side.admit_evaluation(final=False, state_digest="0" * 64)
    for _ in range(2):
        side.admit_evaluation(final=True, state_digest="0" * 64)
        with pytest.raises(ProtocolError, match="another state was evaluated"):
            side.admit_evaluation(final=True, state_digest="1" * 64)


def test_once_the_result_is_there_nothing_is_masked_and_no_secret_is_left(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "secure-aggregation.json"
    side = SecureSide("a", enrolment(FIRST), recipe, "r", file)
    side.answer(keys_order(recipe))
    assert '"seeds": []' not in file.read_text()
    side.admit_evaluation(final=True, state_digest="0" * 64)
    assert '"seeds": []' in file.read_text()
    with pytest.raises(ProtocolError, match="nothing more is masked"):
        side.answer(keys_order(recipe))
