"""A site whose engine fails on the way: what others are told, whether they ask again, and where it stands then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.enrolment import Enrolment
from client.site import SiteService
from core_training import __version__
from core_training.engine import Engine, open_engine
from core_training.errors import RunError
from core_training.recipe import Recipe
from strategies.exchange import Envelope, JoinOrder, JoinReply, Refusal, TrainOrder, Update

RUN = "run"


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    return make_recipe(topology={"kind": "federated", "rounds": 4, "local_steps": 1})


@pytest.fixture
def service(recipe: Recipe, tmp_path: Path) -> SiteService:
    enrolment = Enrolment("federated", "secret")
    return SiteService("a", lambda _: open_engine(recipe), tmp_path, enrolment)


def join(recipe: Recipe) -> Envelope:
    return JoinOrder(run_id=RUN, version=__version__, recipe=recipe.to_yaml()).envelope()


def train(number: int, manifest_digest: str, payload: bytes = b"") -> Envelope:
    return TrainOrder(
        run_id=RUN, round=number, steps=1, evaluate=False, manifest_digest=manifest_digest, payload=payload
    ).envelope()


def test_a_site_that_could_not_go_back_goes_back_before_it_trains_on(
    service: SiteService, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Asked for an earlier round again, its checkpoint cannot be read once; the round after finds it where it was."""
    digest = JoinReply.open(service.handle(join(recipe))).parsed_manifest.digest
    updates = [Update.open(service.handle(train(1, digest)))]
    for number in (2, 3):
        updates.append(Update.open(service.handle(train(number, digest, updates[-1].payload))))
    expected = Update.open(service.handle(train(4, digest, updates[-1].payload)))
    inner, calls = Engine.restore, iter(range(100))

    def restore(self: Engine, folder: Path) -> dict[str, Any]:
        if next(calls) == 0:
            self.reset()  # as far as it came
            raise RunError("out of memory in preparing the model", public="out of memory in preparing the model")
        return inner(self, folder)

    monkeypatch.setattr(Engine, "restore", restore)
    for folder in tmp_path.glob("run/checkpoints/round-000004"):
        folder.rename(tmp_path / "aside")
    # Round 4 from another state than before: the site has to go back to the end of round 3, and cannot.
    other = Refusal.open(service.handle(train(4, digest, updates[0].payload)))
    assert other.reason == "out of memory in preparing the model"
    assert not other.fatal
    again = Update.open(service.handle(train(4, digest, updates[-1].payload)))
    assert again.payload == expected.payload


def test_what_may_pass_is_no_refusal_for_good(recipe: Recipe, tmp_path: Path) -> None:
    attempts = iter(range(10))

    def open_trainable(_: Recipe) -> Engine:
        if next(attempts) == 0:
            raise RunError("out of memory in loading the model and its data")
        return open_engine(recipe)

    service = SiteService("a", open_trainable, tmp_path, Enrolment("federated", "secret"))
    assert not Refusal.open(service.handle(join(recipe))).fatal
    assert JoinReply.open(service.handle(join(recipe))).run_id == RUN
