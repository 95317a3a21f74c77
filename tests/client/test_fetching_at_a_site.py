"""A recipe from outside and the hub: a site fetches what its own file allows, whatever the recipe says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from client.site_config import parse_site_config
from client.worker import Worker
from core_training import __version__
from core_training.foundation.hub_models import find_model
from core_training.foundation.model_files import weights_digest
from core_training.recipe.schema import Recipe
from strategies.messages import Envelope, JoinOrder, JoinReply
from tests.site_folder import give_key
from tests.stand_in_hub import StandInHub


@pytest.fixture
def join(make_recipe: Callable[..., Recipe], site_files: list[Path], tmp_path: Path) -> Callable[..., Envelope]:
    """The answer of a site, whose file has further keys, to a recipe whose model has further ones."""

    @contextmanager
    def working(site: dict[str, Any]) -> Iterator[Worker]:
        document = {
            "name": "heart",
            "server": "localhost:9092",
            "data": {"questions": str(site_files[0])},
            "models": {"base": "org/tiny"},
        }
        give_key(tmp_path / "heart")
        worker = Worker(tmp_path / "heart", parse_site_config({**document, **site}, "site.yaml"))
        try:
            yield worker
        finally:
            worker.service.close()

    def answer(site: dict[str, Any], **model: Any) -> Envelope:
        recipe = make_recipe(
            model={"name_or_path": "base", **model},
            data={"train": "questions"},
            topology={"kind": "federated", "rounds": 1, "local_steps": 1},
        )
        with working(site) as worker:
            order = JoinOrder(run_id="run", version=__version__, recipe=recipe.to_yaml())
            return worker.service.handle(order.envelope())

    return answer


def test_a_recipe_cannot_make_a_site_fetch(hub: StandInHub, tiny_model: Path, join: Callable[..., Envelope]) -> None:
    hub.add("org/tiny", tiny_model)
    refusal = join({}, download=True)
    assert refusal.kind == "refused"
    assert "site 'heart' fetches nothing for a recipe from outside" in refusal.fields["reason"]
    assert join({"download": False}, download=True).kind == "refused"
    # Nor does a site that would, without being asked.
    silent = join({"download": True})
    assert silent.kind == "refused"
    assert "could not work with its model" in silent.fields["reason"]
    assert hub.asked == []


def test_a_site_that_allows_it_fetches_what_its_own_file_names_once(
    hub: StandInHub, tiny_model: Path, join: Callable[..., Envelope]
) -> None:
    hub.add("org/tiny", tiny_model)
    joined = join({"download": True}, download=True)
    assert joined.kind == JoinReply.kind, joined.fields
    assert hub.fetched().count("model.safetensors") == 1
    assert find_model("org/tiny") is not None
    hub.asked.clear()
    other = join({}, digest=weights_digest(tiny_model))
    assert JoinReply.open(other).initial_digest == JoinReply.open(joined).initial_digest
    assert hub.asked == []


@pytest.mark.usefixtures("hub")
def test_a_recipe_may_say_which_weights_a_site_must_have(tiny_model: Path, join: Callable[..., Envelope]) -> None:
    refusal = join({"models": {"base": str(tiny_model)}}, digest="0" * 64)
    assert refusal.fields["reason"] == "model.digest: the weights here are others than the recipe's"
