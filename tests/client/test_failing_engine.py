"""A site whose engine fails on the way: what others are told, whether they ask again, and where it stands then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.enrolment import Enrolment
from client.site import SiteService
from core_training import __version__
from core_training.engine.engine import Engine, open_engine
from core_training.foundation.errors import RunError
from core_training.recipe.schema import Recipe
from strategies.messages import Envelope, JoinOrder, JoinReply, Refusal, TrainOrder, Update

RUN = "run"


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    return make_recipe(topology={"kind": "federated", "rounds": 4, "local_steps": 1})


def join(recipe: Recipe) -> Envelope:
    return JoinOrder(run_id=RUN, version=__version__, recipe=recipe.to_yaml()).envelope()


def train(number: int, manifest_digest: str, payload: bytes = b"") -> Envelope:
    return TrainOrder(
        run_id=RUN, round=number, steps=1, evaluate=False, manifest_digest=manifest_digest, payload=payload
    ).envelope()


def test_a_site_that_could_not_go_back_goes_back_before_it_trains_on(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Asked for the last round again, it could not go back to its start; the round after finds it where it belongs."""
    updates: dict[str, list[Update]] = {}
    services: dict[str, SiteService] = {}
    for name in ("whole", "failing"):
        service = services[name] = SiteService(
            "a", lambda _: open_engine(recipe), tmp_path / name, Enrolment("federated", "secret")
        )
        digest = JoinReply.open(service.handle(join(recipe))).parsed_manifest.digest
        updates[name] = []
        for number in (1, 2, 3):
            payload = updates[name][-1].payload if number > 1 else b""
            updates[name].append(Update.open(service.handle(train(number, digest, payload))))
    inner = Engine.restore

    def restore(self: Engine, folder: Path) -> dict[str, Any]:
        self.reset()  # as far as it came
        raise RunError("out of memory in preparing the model", public="out of memory in preparing the model")

    monkeypatch.setattr(Engine, "restore", restore)
    refused = Refusal.open(services["failing"].handle(train(3, digest, updates["failing"][0].payload)))
    assert refused.reason == "out of memory in preparing the model"
    assert not refused.fatal
    monkeypatch.setattr(Engine, "restore", inner)
    last = [
        Update.open(services[name].handle(train(4, digest, updates[name][-1].payload))).payload for name in services
    ]
    assert last[0] == last[1]


def test_what_may_pass_is_no_refusal_for_good(recipe: Recipe, tmp_path: Path) -> None:
    attempts = iter(range(10))

    def open_trainable(_: Recipe) -> Engine:
        if next(attempts) == 0:
            raise RunError("out of memory in loading the model and its data")
        return open_engine(recipe)

    service = SiteService("a", open_trainable, tmp_path, Enrolment("federated", "secret"))
    assert not Refusal.open(service.handle(join(recipe))).fatal
    assert JoinReply.open(service.handle(join(recipe))).run_id == RUN
